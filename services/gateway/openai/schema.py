"""Requests of OpenAI's API, as far as the gateway serves them.

Fields that change nothing here are accepted and named as such; fields that would change the answer and are not
supported are refused, so that nobody believes in an option that has no effect. Every field has a bound, and lists end
at their first wrong entry (`fail_fast`): a million of them would make a million errors.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

_LONGEST_TEXT = 10_000_000
_LARGEST_SCHEMA = 100_000
_MOST_ENTRIES = 1024
Name = Annotated[str, Field(max_length=128)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Text = Annotated[str, Field(max_length=_LONGEST_TEXT)]
Ignored = Annotated[str, Field(max_length=512)]


class Wire(BaseModel):
    """A body, or a part of one. Fields that it does not know are refused, the first by name; null says nothing."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"additionalProperties": False},
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="after")
    def _known_fields(self) -> Wire:
        # Not `extra="forbid"`: it makes an error of every unknown field, and a body may hold very many.
        said = (name for name, value in (self.__pydantic_extra__ or {}).items() if value is not None)
        if (unknown := next(said, None)) is not None:
            name = unknown[:64]
            raise PydanticCustomError("extra_forbidden", "this field is not known here; leave it out", {"name": name})
        return self


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class CacheControl(Wire):
    type: Ignored
    ttl: Ignored | None = None


class TextPart(Wire):
    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None
    """Accepted, without effect."""


class FunctionCall(Wire):
    name: FunctionName
    arguments: Annotated[str, Field(max_length=100_000)]
    """A JSON object as text."""


class ToolCallParam(Wire):
    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class RefusalPart(Wire):
    type: Literal["refusal"]
    refusal: Text
    """What an assistant said."""

    @property
    def text(self) -> str:
        return self.refusal


class ChatMessage(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Text
        | Annotated[
            list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]],
            Field(fail_fast=True, max_length=1024),
        ]
        | None
    ) = None
    reasoning_content: Text | None = None
    """Thoughts of an assistant message, apart from what it says. Not in OpenAI's API."""
    name: Name | None = None
    tool_calls: Annotated[list[ToolCallParam], Field(fail_fast=True, max_length=64)] | None = None
    tool_call_id: Name | None = None
    refusal: Text | None = None
    """Accepted, without effect."""
    annotations: Annotated[list[Any], Field(max_length=64)] | None = None
    """Accepted, without effect."""
    cache_control: CacheControl | None = None
    """Accepted, without effect."""
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing; only an assistant message with tool_calls may leave it out")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs tool_call_id, the call that it answers")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant message has tool_calls")
        return self


class FunctionDefinition(Wire):
    name: FunctionName
    description: Annotated[str, Field(max_length=10_000)] | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _bounded(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return bounded_schema(value)


class Tool(Wire):
    type: Literal["function"]
    function: FunctionDefinition
    cache_control: CacheControl | None = None
    """Accepted, without effect."""


class NamedFunction(Wire):
    name: FunctionName


class NamedToolChoice(Wire):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Wire):
    type: Literal["text", "json_object"]


class JsonSchema(Wire):
    name: FunctionName
    description: Annotated[str, Field(max_length=10_000)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _bounded(cls, value: dict[str, Any]) -> dict[str, Any] | None:
        return bounded_schema(value)


def bounded_schema(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is not None and len(json.dumps(value)) > _LARGEST_SCHEMA:
        raise ValueError(f"the schema has more than {_LARGEST_SCHEMA} characters; simplify it")
    return value


class JsonSchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Wire):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted, without effect."""


def few_entries(value: Any) -> Any:
    """Refuses a large object as a whole, before each of its entries makes an error."""
    if isinstance(value, dict) and len(value) > _MOST_ENTRIES:
        raise ValueError(f"it has {len(value)} entries, the limit is {_MOST_ENTRIES}")
    return value


StopText = Annotated[str, Field(min_length=1, max_length=256)]


PromptToken = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
_MOST_TOKENS = 20_000
_MOST_SCORED = 100_000
"""Characters, or token ids, of prompts whose tokens' log-probabilities are told: each makes some hundred bytes."""
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class _Sampling(Wire):
    model: Name
    """A name that `/v1/models` lists."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Number of choices."""
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = None
    """Texts that end the answer; they are not part of it."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same seed with the same weights version gives the same answer."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 means greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling."""
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    """Draw from the k most likely tokens; 0 means off. Not in OpenAI's API."""
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    """The answer does not end before. Not in OpenAI's API."""
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Longest answer in tokens."""
    stream: bool | None = None
    """Send server-sent events."""
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    """Accepted, without effect: who is asking comes only from a verified token."""
    consent: bool | None = None
    """Whether the end customer agreed to training on this answer; without it the tenant's setting counts, and without
    that it is no. Not in OpenAI's API."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken off the logit of every token that the answer already has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken off for every time that the answer already has the token."""
    logit_bias: (
        Annotated[
            dict[TokenId, Annotated[float, Field(ge=-100, le=100)]],
            BeforeValidator(few_entries),
            Field(max_length=1024),
        ]
        | None
    ) = None
    """By token id as text: what is added to its logit."""

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatCompletionRequest(_Sampling):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Longest answer in tokens."""
    logprobs: bool | None = None
    """Report the log-probability of every token."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Alternatives reported for every token; needs `logprobs`."""
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    """Functions that the caller runs. The gateway's own tools are configured on the server."""
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    """`required` or a named function: the answer is constrained to one call of an offered tool."""
    parallel_tool_calls: bool | None = None
    """false: at most one call a turn; further ones of the model's are left out."""
    response_format: Annotated[TextFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    """Constrains the answer to JSON."""
    conversation_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """Continue a stored conversation: its turns go before `messages`. Not in OpenAI's API."""
    reasoning_effort: ReasoningEffort | None = None
    """How much to think, for a model that knows it."""
    continue_final_message: bool | None = None
    """Whether a last message of the assistant is the beginning of the answer, which goes on from there: without it yes,
    unless it calls tools. Not in OpenAI's API."""
    add_generation_prompt: bool | None = None
    """Accepted as the opposite of `continue_final_message`, as servers of that kind take it. Not in OpenAI's API."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Accepted, without effect."""
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    """Only text."""
    metadata: Annotated[dict[Ignored, Ignored], BeforeValidator(few_entries), Field(max_length=16)] | None = None
    """Accepted, without effect."""
    store: bool | None = None
    """Accepted, without effect."""
    service_tier: Ignored | None = None
    """Accepted, without effect."""
    safety_identifier: Ignored | None = None
    """Accepted, without effect."""
    prompt_cache_key: Ignored | None = None
    """Accepted, without effect."""
    prompt_cache_retention: Ignored | None = None
    """Accepted, without effect."""

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.continue_final_message and not self.continues:
            raise ValueError("continue_final_message needs a last message of the assistant that calls no tools")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other; send one of them")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedToolChoice):
            if self.tool_choice.function.name not in {tool.function.name for tool in self.tools or []}:
                raise ValueError(f"tool_choice names '{self.tool_choice.function.name}', which is not in tools")
        return self

    @property
    def continues(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        last = self.messages[-1]
        return last.role == "assistant" and not last.tool_calls and self.continue_final_message is not False

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered_tools(self) -> list[Tool]:
        """Tools the model may call, narrowed by `tool_choice`."""
        if not self.tools or self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedToolChoice):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call of an offered tool."""
        return isinstance(self.tool_choice, NamedToolChoice) or self.tool_choice == "required"

    @property
    def json_schema(self) -> str:
        """What constrains the answer, as JSON text; empty: free text."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return json.dumps(self.response_format.json_schema.schema_)
        if self.response_format is not None and self.response_format.type == "json_object":
            return '{"type": "object"}'
        return ""


class CompletionRequest(_Sampling):
    prompt: (
        Text
        | Annotated[list[PromptToken], Field(fail_fast=True, min_length=1, max_length=_MOST_TOKENS)]
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=64)]
        | Annotated[
            list[Annotated[list[PromptToken], Field(fail_fast=True, min_length=1, max_length=_MOST_TOKENS)]],
            Field(fail_fast=True, min_length=1, max_length=64),
        ]
    )
    """Text to continue, or its token ids in the model's vocabulary; or several of one kind."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Report log-probabilities, with this many alternatives for every token."""
    echo: bool | None = None
    """Give the prompt before its continuation, with `logprobs` those of its own tokens, too."""
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    """Longest continuation in tokens; 0 with `echo`: none."""
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    """Only 1."""

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 leaves nothing to give back; send echo: true with it, or at least 1")
        if self.scores_prompt:
            if (self.n or 1) > 1:
                raise ValueError("echo with logprobs gives one choice a prompt, whose tokens are the same; leave n out")
            size = sum(map(len, self.prompts))
            if size > _MOST_SCORED:
                raise ValueError(f"echo with logprobs takes {_MOST_SCORED:,} characters of prompts, here are {size:,}")
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are asked for."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
