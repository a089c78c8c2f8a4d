"""What of an answer is text, what is a tool call, and what goes out when nobody reads along."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from services.policy.chat import ChatFormat, answer
from services.policy.engine import Event, GenerationRequest, SampleFinished, TokenEvent
from services.policy.reading import AnswerReader, StopTexts, TextStream
from steersman.errors import InvalidArgumentError
from steersman.generation import EngineInfo
from steersman.nn.tokens import stop_ids
from steersman.testing.models import tiny_tokenizer
from steersman.v1 import common_pb2
from steersman.v1 import policy_pb2 as pb

CALL = '<tool_call>{"name": "f", "arguments": {"a": {"b": 1}}}</tool_call>'


TOKENIZER = tiny_tokenizer()
"""One byte is one token."""


class AnyTools(ChatFormat):
    """The template shows tools."""

    def knows_tools(self) -> bool:
        return True


class Scripted:
    """An engine that says one text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def info(self) -> EngineInfo:
        fields = dict.fromkeys(EngineInfo.__dataclass_fields__)
        return EngineInfo(**{**fields, "vocab_size": 300, "weights_version": 7})  # type: ignore[arg-type]

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        ids = np.array(TOKENIZER.encode(self.text, add_special_tokens=False), np.int32)
        for token in ids:
            on_event(TokenEvent(0, 0, int(token), -0.5, 7))
        on_event(SampleFinished(0, 0, ids, np.zeros(len(ids), np.float32), "stop", (7,)))
        return 1

    def cancel(self, handle: int) -> None:
        pass


async def responses(text: str, **fields: Any) -> list[pb.PolicyServiceChatResponse]:
    request = pb.PolicyServiceChatRequest(
        messages=[common_pb2.Message(role="user", content="hi")],
        sampling=common_pb2.SamplingParams(max_new_tokens=500),
        **fields,
    )
    chat = AnyTools(TOKENIZER, "", stop_ids(TOKENIZER))
    return [response async for response in answer(Scripted(text), chat, request)]  # type: ignore[arg-type]


@pytest.mark.parametrize("whole", [False, True])
async def test_a_tool_call_is_no_text(whole: bool) -> None:
    got = await responses(f"Let me look. {CALL}", tools_json="[]", whole=whole)
    assert "".join(response.delta for response in got).rstrip() == "Let me look."
    assert [(call.name, call.arguments) for call in got[-1].tool_calls] == [("f", '{"a": {"b": 1}}')]
    assert got[-1].finish_reason == common_pb2.FINISH_REASON_TOOL_CALLS


async def test_what_only_looks_like_a_call_stays_text() -> None:
    for text in ("a <tool_call>{broken}</tool_call>", "5 <tool", "<tool_call>"):
        got = await responses(text, tools_json="[]")
        assert "".join(response.delta for response in got) == text, text
        assert not got[-1].tool_calls
    got = await responses(CALL)
    assert "".join(response.delta for response in got) == CALL


async def test_one_response_when_nobody_reads_along() -> None:
    many, one = await responses("hello there"), await responses("hello there", whole=True)
    assert len(many) == len("hello there") + 1
    assert len(one) == 1
    assert one[0].delta == "hello there" == "".join(response.delta for response in many)
    assert [token.text for token in one[0].tokens] == list("hello there")
    assert (one[0].completion_tokens, one[0].weights_version) == (11, 7)
    stopped = await responses("hello there", whole=True, stop=["lo t"])
    assert [(response.delta, response.finish_reason) for response in stopped] == [
        ("hel", common_pb2.FINISH_REASON_STOP)
    ]


def test_what_may_become_a_stop_text_is_held_back() -> None:
    stops = StopTexts(["<x>"])
    assert [stops.push(part) for part in ("a<", "y", "><", "x", ">cd", "e")] == ["a", "<y", ">", "", "", ""]
    assert stops.stopped
    assert stops.text == "a<y>"
    ended = StopTexts(["<x>"])
    assert ended.push("a<") + ended.push("", final=True) == "a<"


def test_characters_come_whole() -> None:
    stream = TextStream(TOKENIZER)
    parts = [stream.push(token) for token in TOKENIZER.encode("é€", add_special_tokens=False)]
    assert parts == ["", "é", "", "", "€"]


async def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="stop"):
        await responses("hello", stop=[""])


def test_hostile_texts_are_read_in_time() -> None:
    family = ChatFormat(TOKENIZER, "").family()
    for hostile in ("<tool_call>{" * 1000, "<" * 10_000, "<think>" * 1500, "</think>" * 1500, " " * 10_000):
        reader = AnswerReader(TextStream(TOKENIZER), (), family.whole)
        start = time.thread_time()
        pieces = [reader.push(token) for token in TOKENIZER.encode(hostile, add_special_tokens=False)]
        pieces.append(reader.finish())
        assert time.thread_time() - start < 10, "about 0.1 ms a token is usual"
        assert not any(piece.calls for piece in pieces)
