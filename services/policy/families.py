"""How the chat families write thoughts and tool calls: transformers' response templates.

A model's own (saved with its tokenizer) comes first, then TRL's for the chat template as it is, then TRL's for the
marks that the chat template uses; one with none of them is read as the Hermes family, `<tool_call>{...}</tool_call>`.
"""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

from steersman.nn.render import template_source

EFFORTS = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"})
_THOUGHT = {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"}


def response_template(tokenizer: Any) -> dict[str, Any]:
    """The response template of a tokenizer's chat family, as this service reads it."""
    own = getattr(tokenizer, "response_template", None)
    if own:
        return copy.deepcopy(own)
    return _mended(_of_family(template_source(tokenizer)))


def _of_family(source: str) -> dict[str, Any]:
    # Here: it imports much, and nothing but a service that answers chats needs it.
    from trl import chat_template_utils as trl

    known: Any = SimpleNamespace(chat_template=source)
    try:
        trl.add_response_schema(known)
    except ValueError:
        pass
    else:
        found: dict[str, Any] = known.response_template
        return copy.deepcopy(found)
    marks = {
        "<|channel|>": trl.gptoss_template,
        "<function=": trl.qwen3_5_template,
        "<arg_key>": trl.glm4moe_template,
        "<|tool_call_start|>": trl.lfm2_2_5_template,
        "<|tool_call>call:": trl.gemma4_template,
        "<|eot_id|>": trl.llama3_template,
    }
    family = next((template for mark, template in marks.items() if mark in source), trl.qwen3_template)
    return copy.deepcopy(family)


def _mended(template: dict[str, Any]) -> dict[str, Any]:
    """The template for a stream of what models write, rather than for what their chat templates write."""
    fields = template["fields"]
    thought = fields.get("reasoning_content", {})
    if thought.get("open_pattern", "").startswith("(?="):
        # Looks ahead for the end of a thought, so that nothing streams; the prompt that opens it tells as much.
        fields["reasoning_content"] = dict(_THOUGHT)
        anchor = "start_anchor" if "start_anchor" in template else "start_anchor_pattern"
        template[anchor] = template[anchor].partition("<think>")[0]
    calls = fields.get("tool_calls", {})
    opening = calls.get("open_pattern", "")
    if opening.startswith(r'\{"name"'):  # Llama 3 ends a turn with a call otherwise, or is cut off behind it
        calls["close_pattern"] = r"\}\s*(?:<\|eo[tm]_id\|>\s*|$)"
        calls["open_pattern"] = r"(?:<\|python_tag\|>)?" + opening
    if opening.startswith(r"to=functions"):  # gpt-oss also writes the recipient behind the channel
        name = r"to=functions\.(?P<name>[^\s<]+)"
        kind = r"<\|channel\|>commentary"
        calls["open_pattern"] = rf"(?:{name}\s*{kind}|{kind}\s+{name})\s*(?:<\|constrain\|>)?(?:json)?<\|message\|>"
    if opening.startswith(r"(?:<\|tool_call_start\|>\[|"):  # LFM 2: a comma alone is no call
        calls["open_pattern"] = opening.replace(r",\s*", r"(?<=\)),\s*", 1)
    if calls.get("content") == "json":
        calls["content_args"] = {**calls.get("content_args", {}), "allow_non_json": True}
    return template


def without_calls(template: dict[str, Any]) -> dict[str, Any]:
    """The template for a model that was offered no tools: a call is text."""
    return {**template, "fields": {name: field for name, field in template["fields"].items() if name != "tool_calls"}}


def effort_options(source: str, effort: str) -> dict[str, Any] | None:
    """Variables of a chat template that make a model think so much; None: the template knows no such thing.

    Args:
        source: of the chat template.
        effort: none, minimal, low, medium, high, xhigh or max.
    """
    if re.search(r"\breasoning_effort\b", source):
        nearest = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
        named = re.search(rf"['\"]{effort}['\"]", source) is not None
        return {"reasoning_effort": effort if named else nearest.get(effort, effort)}
    if re.search(r"\benable_thinking\b", source):
        return {"enable_thinking": effort != "none"}
    if re.search(r"{%-?[^%]*\bthinking\b[^%]*%}", source):
        return {"thinking": effort != "none"}
    return {} if effort == "none" else None
