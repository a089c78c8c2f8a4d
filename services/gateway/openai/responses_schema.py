"""Requests of OpenAI's Responses API, as far as the gateway serves them; see `services.gateway.openai.schema`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from services.gateway.openai.schema import (
    FunctionDefinition,
    FunctionName,
    Ignored,
    JsonSchema,
    Name,
    ReasoningEffort,
    RefusalPart,
    StreamOptions,
    Text,
    TextFormat,
    Wire,
    few_entries,
)

_LARGEST_IGNORED = 1_000_000
ItemId = Annotated[str, Field(max_length=128)]
Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Wire):
    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=64)] | None = None
    """Accepted, without effect."""
    logprobs: list[Any] | None = None
    """Accepted, without effect."""


Part = Annotated[InputText | RefusalPart, Field(discriminator="type")]


class InputMessage(Wire):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True, max_length=1024)]
    id: ItemId | None = None
    status: Status | None = None
    phase: Ignored | None = None
    """Accepted, without effect."""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class FunctionCallItem(Wire):
    type: Literal["function_call"]
    call_id: Name
    name: FunctionName
    arguments: Annotated[str, Field(max_length=100_000)]
    """A JSON object as text."""
    id: ItemId | None = None
    status: Status | None = None


class FunctionCallOutput(Wire):
    type: Literal["function_call_output"]
    call_id: Name
    output: Text | Annotated[list[InputText], Field(fail_fast=True, max_length=1024)]
    id: ItemId | None = None
    status: Status | None = None

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class SummaryText(Wire):
    type: Literal["summary_text"]
    text: Text


class ReasoningText(Wire):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Wire):
    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(fail_fast=True, max_length=64)] = []
    content: Annotated[list[ReasoningText], Field(fail_fast=True, max_length=64)] | None = None
    encrypted_content: Annotated[str, Field(max_length=_LARGEST_IGNORED)] | None = None
    """Accepted, without effect: thoughts are not encrypted here."""
    id: ItemId | None = None
    status: Status | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


class ItemReference(Wire):
    type: Literal["item_reference"] | None = None
    id: ItemId
    """Of an item of a response that is stored here."""


def _kind(item: Any) -> str | None:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    if kind is None and isinstance(item, dict):
        return "Message" if "role" in item else "Reference"
    # Capitals: tags are no fields, see `services.gateway.errors`.
    kinds = {
        "message": "Message",
        "function_call": "Call",
        "function_call_output": "Output",
        "reasoning": "Reasoning",
        "item_reference": "Reference",
    }
    return kinds.get(kind) if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("Message")]
    | Annotated[FunctionCallItem, Tag("Call")]
    | Annotated[FunctionCallOutput, Tag("Output")]
    | Annotated[ReasoningItem, Tag("Reasoning")]
    | Annotated[ItemReference, Tag("Reference")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="its type must be message, function_call, function_call_output, reasoning or "
        "item_reference; this gateway takes no other items",
    ),
]


class _OfFunctions(Wire):
    type: Literal["function"]


class FunctionTool(FunctionDefinition, _OfFunctions):
    """A function that the caller runs; the gateway's own tools are configured on the server.

    The type is looked at before the rest: what is none of a function is refused by it.
    """


class NamedFunction(_OfFunctions):
    name: FunctionName


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextConfig(Wire):
    format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    """Constrains the answer to JSON."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Accepted, without effect."""


class Reasoning(Wire):
    effort: ReasoningEffort | None = None
    """How much to think, for a model that knows it."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted, without effect: thoughts are given as they are."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted, without effect."""


class ResponsesRequest(Wire):
    model: Name
    """A name that `/v1/models` lists."""
    input: Text | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=4096)]
    """A text, or the items of a conversation."""
    instructions: Text | None = None
    """A system message for this answer alone."""
    previous_response_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """Continue a response that was stored: its conversation goes before `input`."""
    store: bool | None = None
    """false: the response is not kept, and cannot be continued or read again."""
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 means greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Alternatives reported for every token."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same seed with the same weights version gives the same answer. Not in OpenAI's API."""
    stream: bool | None = None
    """Send server-sent events."""
    stream_options: StreamOptions | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    """`required` or a named function: the answer is constrained to one call of an offered tool."""
    parallel_tool_calls: bool | None = None
    """false: at most one call; further ones of the model's are left out."""
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: (
        Annotated[
            list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]],
            Field(fail_fast=True, max_length=8),
        ]
        | None
    ) = None
    """`message.output_text.logprobs` reports the log-probability of every token; thoughts are never encrypted."""
    consent: bool | None = None
    """Whether the end customer agreed to training on this answer. Not in OpenAI's API."""
    metadata: Annotated[dict[Ignored, Ignored], BeforeValidator(few_entries), Field(max_length=16)] | None = None
    """Given back with the response."""
    background: Literal[False] | None = None
    """Only false: an answer is given while its caller waits."""
    truncation: Literal["disabled"] | None = None
    """Only `disabled`: what is too long is refused."""
    user: Ignored | None = None
    """Accepted, without effect: who is asking comes only from a verified token."""
    safety_identifier: Ignored | None = None
    """Accepted, without effect."""
    service_tier: Ignored | None = None
    """Accepted, without effect."""
    prompt_cache_key: Ignored | None = None
    """Accepted, without effect."""
    prompt_cache_retention: Ignored | None = None
    """Accepted, without effect."""

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedFunction):
            if self.tool_choice.name not in {tool.name for tool in self.tools or []}:
                raise ValueError(f"tool_choice names '{self.tool_choice.name}', which is not in tools")
        return self

    @property
    def stored(self) -> bool:
        return self.store is not False

    @property
    def logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @property
    def items(self) -> list[InputMessage | FunctionCallItem | FunctionCallOutput | ReasoningItem | ItemReference]:
        if isinstance(self.input, str):
            return [InputMessage(role="user", content=self.input)]
        return self.input
