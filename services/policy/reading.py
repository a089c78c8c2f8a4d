"""What a model writes, taken apart as it comes: thoughts, the answer's text, tool calls.

token ids -- decoded --> text -- transformers' streaming parser --> thoughts | text -- stop texts --> text | calls
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_parsing.response_parser import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from steersman.v1 import common_pb2

_THOUGHTS = ("reasoning_content", "thinking")


@dataclass
class TextStream:
    """Turns token ids into text as they arrive; holds back incomplete characters.

    The two offsets are those of vLLM's and TGI's incremental detokenization: text is decoded from a few
    tokens back, because a token's text depends on its neighbours.
    """

    tokenizer: Any
    dropped: frozenset[int] = frozenset()
    """Tokens that are no text, special or not."""
    kept: frozenset[int] = frozenset()
    """Special tokens that are given as their names; all others are left out."""
    ids: list[int] = field(default_factory=list)
    _prefix: int = 0
    _read: int = 0

    def push(self, token_id: int) -> str:
        """Adds a token and returns the new text that is certain."""
        self.ids.append(token_id)
        before = self._decode(self.ids[self._prefix : self._read])
        now = self._decode(self.ids[self._prefix :])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self._prefix, self._read = self._read, len(self.ids)
            return now[len(before) :]
        return ""

    def finish(self) -> str:
        """The rest of the text."""
        before = self._decode(self.ids[self._prefix : self._read])
        rest = self._decode(self.ids[self._prefix :])[len(before) :]
        self._prefix = self._read = len(self.ids)
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        found: str = self.tokenizer.decode([t for t in ids if t not in self.dropped], skip_special_tokens=not self.kept)
        return found


@dataclass
class StopTexts:
    """Lets text through up to the first stop text; holds back what may become one."""

    stop: Sequence[str] = ()
    text: str = ""
    """Everything so far, stop texts excluded."""
    sent: int = 0
    stopped: bool = False

    def push(self, text: str, *, final: bool = False) -> str:
        """Adds text and returns what is certain; `final`: no more comes."""
        if self.stopped:
            return ""
        self.text += text
        hits = [
            position for stop in self.stop if (position := self.text.find(stop, max(0, self.sent - len(stop)))) >= 0
        ]
        if hits:
            self.stopped = True
            self.text = self.text[: min(hits)]
            end = len(self.text)
        elif final:
            end = len(self.text)
        else:
            end = len(self.text) - max((_overlap(self.text, stop) for stop in self.stop), default=0)
        delta = self.text[self.sent : max(self.sent, end)]
        self.sent = max(self.sent, end)
        return delta


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class _Parser(ResponseParser):
    """The library's parser, which also tells how a region was written."""

    _begin = 0

    @property
    def region(self) -> str | None:
        return self._current

    def _open_explicit(self, events: list[dict[str, Any]], field: Any, m: Any) -> None:
        self._begin = m.start()
        super()._open_explicit(events, field, m)

    def _close_current(self, events: list[dict[str, Any]]) -> None:
        before = len(events)
        super()._close_current(events)
        if len(events) > before:
            events[-1]["raw"] = self._buffer[self._begin : self._pos]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a token brings."""

    text: str = ""
    thoughts: str = ""
    calls: tuple[common_pb2.ToolCall, ...] = ()


class AnswerReader:
    """Of one choice of a conversation's answer: `push` its tokens, then `finish`."""

    def __init__(
        self,
        stream: TextStream,
        stop: Sequence[str],
        template: ResponseTemplate | None,
        prefix: str = "",
        tools: list[Any] | None = None,
        marks: Sequence[str] = (),
    ) -> None:
        """Args:
        template: how the model writes; None: everything is text.
        prefix: what the chat template put before the answer, and nothing that a caller said.
        tools: what was offered: arguments get the types of their schemas.
        marks: names of control tokens, which are no text.
        """
        self._stream = stream
        self._stops = StopTexts(stop)
        self._parser = _Parser(template, prefix=prefix, tools=tools) if template is not None else None
        self._marks = tuple(marks)
        self._space = ""
        """White space that is given only with what follows it."""
        self._thought_space = ""
        self._thought = self._called = False
        self.thought_tokens = 0

    @property
    def ids(self) -> list[int]:
        return self._stream.ids

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, token_id: int) -> Piece:
        piece = self._read(self._stream.push(token_id))
        if piece.thoughts or (self._parser is not None and self._parser.region in _THOUGHTS):
            self.thought_tokens += 1
        return piece

    def finish(self) -> Piece:
        piece = self._read(self._stream.finish(), final=True)
        held = self._stops.push("" if self._called else self._space, final=True)
        self._space = ""
        return Piece(piece.text + held, piece.thoughts, piece.calls)

    def _read(self, text: str, *, final: bool = False) -> Piece:
        if self._parser is None:
            return Piece(self._stops.push(text))
        events = self._parser.feed(text)
        if final:
            events += self._parser.finalize()[1]
        said, thoughts, calls = "", "", []
        for event in events:
            kind, name = event["type"], event["field"]
            if kind == "region_close" and name == "tool_calls":
                call = _call(event["value"])
                if call is None or not self._closed(event["raw"]):
                    said += self._plain(event["raw"])
                else:
                    calls.append(call)
                    self._called = True
                    said = said.rstrip()
                    self._space = self._space if said else ""
            elif kind == "region_chunk" and name == "content":
                said += self._plain(event["text"])
            elif kind == "region_chunk" and name in _THOUGHTS:
                thoughts += self._thoughts(event["text"])
        return Piece(self._spaced(said), thoughts, tuple(calls))

    def _closed(self, raw: str) -> bool:
        """Whether a call was written to its end: one that was cut off may lack arguments."""
        assert self._parser is not None
        calls = self._parser._spec.fields["tool_calls"]
        return calls.content == "json" or calls.close_re is None or calls.close_re.search(raw) is not None

    def _spaced(self, text: str) -> str:
        """The text that is certain to belong to the answer; a call takes the white space before it away."""
        if self._parser is None or "tool_calls" not in self._parser._spec.fields:
            return self._stops.push(text)
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        return self._stops.push(kept)

    def _thoughts(self, text: str) -> str:
        text = self._plain(text)
        if not self._thought:
            text = text.lstrip()
        text = self._thought_space + text
        kept = text.rstrip()
        self._thought_space = text[len(kept) :]
        self._thought = self._thought or bool(kept)
        return kept

    def _plain(self, text: str) -> str:
        for mark in self._marks:
            if mark in text:
                text = text.replace(mark, "")
        return text


def _call(value: Any) -> common_pb2.ToolCall | None:
    """A call as the parser gives it; None for one that the model wrote wrongly."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", function.get("parameters", {}))
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        text = json.dumps(arguments, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict):
        return None
    return common_pb2.ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", name=function["name"], arguments=text)
