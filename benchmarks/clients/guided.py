"""An engine whose answers are known before: the real one, with all tokens but those of a script forbidden.

So tool loops run to their end with a tiny random model, and everything around it (chat template, grammar, reading of
calls, log-probabilities) is what serves real models. The script of a turn:

    tools are shown, and n results are there     the call of tool n, with the smallest arguments of its schema
    there is no such tool                        a sentence

Where a schema constrains the answer, the script holds as far as the schema allows it; a text to continue has none.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from services.policy.chat import ChatFormat
from services.policy.engine import Event, GenerationRequest
from services.policy.engines.transformers_engine import TransformersEngine
from steersman.generation import TokenConstraint

# The chat templates of the tiny and the default model show no tools.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TOOLS, _RESULT, _TURN = "<|im_start|>system\nTools: ", "<|im_start|>tool\n", "<|im_start|>assistant\n"
_SENTENCE = "Your order is on its way."


class GuidedEngine(TransformersEngine):
    """See the module."""

    chat: ChatFormat
    """Of the model; set before the first request."""

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        constraint = guide(self.chat, request, self.info().vocab_size)
        return super().submit(dataclasses.replace(request, constraint=constraint), on_event)


def guide(chat: ChatFormat, request: GenerationRequest, vocab_size: int) -> TokenConstraint | None:
    """What allows the longest token that goes on with the script, of those that the request's own constraint allows."""
    prompt = chat.tokenizer.decode(request.prompts[0])
    text = script(prompt, constrained=request.constraint is not None)
    if text is None:
        return request.constraint
    texts = {token: chat.text_of(token) for token in range(len(chat.tokenizer)) if token not in chat.stop_ids}
    pieces = sorted((token for token, piece in texts.items() if piece and piece in text), key=lambda t: -len(texts[t]))

    def allowed(prompt_index: int, sample_index: int, so_far: Sequence[int]) -> np.ndarray | None:
        mask = request.constraint(prompt_index, sample_index, so_far) if request.constraint else None
        said = "".join(texts.get(token, "") for token in so_far)
        if not text.startswith(said):
            return mask
        next_ones = chat.stop_ids if said == text else [t for t in pieces if text.startswith(texts[t], len(said))]
        token = next((token for token in next_ones if mask is None or mask[token]), None)
        if token is None:
            return mask
        only = np.zeros(vocab_size if mask is None else len(mask), dtype=bool)
        only[token] = True
        return only

    return allowed


def script(prompt: str, *, constrained: bool) -> str | None:
    """What is to be said next; None: whatever the model says."""
    if not prompt.endswith(_TURN):
        return None
    call = _next_call(prompt)
    if call is None:
        return None if constrained else _SENTENCE
    text = json.dumps(call, separators=(",", ":"))  # as the grammar of schemas has it
    return text if constrained else f"<tool_call>{text}</tool_call>"


def _next_call(prompt: str) -> dict[str, Any] | None:
    if not prompt.startswith(_TOOLS):
        return None
    tools, _ = json.JSONDecoder().raw_decode(prompt[len(_TOOLS) :])
    results = prompt.count(_RESULT)
    if results >= len(tools):
        return None
    function = tools[results]["function"]
    return {"name": function["name"], "arguments": smallest(function.get("parameters") or {})}


def smallest(schema: dict[str, Any]) -> Any:
    """A value of a plain schema, without references."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: smallest(properties[name]) for name in schema.get("required", ())}
    if kind in ("integer", "number"):
        return schema.get("minimum", 3)
    return {"string": "three", "boolean": True, "array": [], "null": None}[kind]
