"""A conversation as labelers see it: what was said, which tools were called with what, and what came back."""

from __future__ import annotations

import json
from typing import Any


def parts(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What happened, in order: {"kind": text, call or result, "role", "name", "text"}.

    Two answers that say the same but did different things look different only by their calls and results.
    """
    found: list[dict[str, str]] = []
    names = {
        str(call.get("id")): str((call.get("function") or {}).get("name", ""))
        for message in messages
        for call in message.get("tool_calls") or ()
    }
    for message in messages:
        role, text = str(message.get("role", "")), message.get("content")
        text = text if isinstance(text, str) else "" if text is None else _pretty(text)
        if role == "tool":
            name = str(message.get("name") or names.get(str(message.get("tool_call_id")), ""))
            found.append({"kind": "result", "role": role, "name": name, "text": _pretty(text)})
            continue
        if text or not message.get("tool_calls"):
            found.append({"kind": "text", "role": role, "name": "", "text": text})
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            arguments = _pretty(function.get("arguments", ""))
            found.append({"kind": "call", "role": role, "name": str(function.get("name", "")), "text": arguments})
    return found


def said(messages: list[dict[str, Any]]) -> str:
    """The words of the answer alone."""
    return "\n\n".join(part["text"] for part in parts(messages) if part["kind"] == "text")


def _pretty(given: Any) -> str:
    """JSON on several lines; any other text as it is."""
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given)
        except (ValueError, RecursionError):
            return given
        if not isinstance(value, dict | list):
            return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False, indent=2)
