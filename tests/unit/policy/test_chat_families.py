"""Thoughts, text and calls as the chat families write them, token by token, by the templates that TRL ships."""

from __future__ import annotations

import json
from typing import Any

import pytest
from trl import chat_template_utils as trl

from services.policy.chat import ChatFormat
from services.policy.families import effort_options
from steersman.errors import InvalidArgumentError
from steersman.nn.render import answer_prefix, prompt_ids, template_source
from steersman.testing.models import tiny_tokenizer
from steersman.v1 import common_pb2
from steersman.v1 import policy_pb2 as pb

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "hot": {"type": "boolean"}},
}
TOOLS = json.dumps(
    [{"type": "function", "function": {"name": "weather", "description": "w", "parameters": PARAMETERS}}]
)
SPECIAL = {
    "gptoss": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"],
    "llama3_1": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
    "glm4moe": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n75001\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
XML_BOOL = "<tool_call>\n<function=weather>\n<parameter=hot>\nfalse\n</parameter>\n</function>\n</tool_call>"
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>75001</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
ROME = {"city": "Rome", "days": 3}
PARIS = {"city": "75001", "days": 3}

CASES: list[tuple[str, str, str, str, list[dict[str, Any]]]] = [
    # template, what the model writes, thoughts, text, arguments of its calls
    ("qwen2_5", f"Let me look.\n{HERMES}\n{SECOND}<|im_end|>", "", "Let me look.", [ROME, {"city": "Oslo"}]),
    ("qwen3", f"<think>\nHm, Rome.\n</think>\n\n{HERMES}<|im_end|>", "Hm, Rome.", "", [ROME]),
    ("qwen3", "<think>\nHm.\n</think>\n\nIt is hot.<|im_end|>", "Hm.", "It is hot.", []),
    ("qwen3", "It is hot.<|im_end|>", "", "It is hot.", []),
    ("qwen3", '<tool_call>\n{"name": "weather", "arg<|im_end|>', "", '<tool_call>\n{"name": "weather", "arg', []),
    ("qwen3_5_think", f"Hm.\n</think>\n\n{XML}\n{XML_BOOL}<|im_end|>", "Hm.", "", [PARIS, {"hot": False}]),
    ("qwen3_5_nothink", f"Look:\n{XML}<|im_end|>", "", "Look:", [PARIS]),
    ("qwen3_5_nothink", f"{XML[:60]}<|im_end|>", "", XML[:60], []),
    ("nemotron_3_nano", f"Hm.\n</think>\n{XML}<|im_end|>", "Hm.", "", [PARIS]),
    ("nemotron_3_nano", "Hm.\n</think>\nIt is hot.<|im_end|>", "Hm.", "It is hot.", []),
    ("glm4moe", f"<think>Hm.</think>\n{GLM}<|observation|>", "Hm.", "", [PARIS]),
    ("llama3_1", '{"name": "weather", "parameters": {"city": "Rome", "days": 3}}<|eot_id|>', "", "", [ROME]),
    ("llama3_1", '{"name": "weather", "parameters": {"city": "Rome", "days": 3}}<|eom_id|>', "", "", [ROME]),
    ("llama3_1", "It is hot.<|eot_id|>", "", "It is hot.", []),
    (
        "gptoss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Rome", "days": 3}<|call|>',
        "Hm.",
        "",
        [ROME],
    ),
    (
        "gptoss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It is hot.<|return|>",
        "Hm.",
        "It is hot.",
        [],
    ),
]  # fmt: skip


def chat_of(name: str) -> ChatFormat:
    tokenizer = tiny_tokenizer(chat_template=getattr(trl, f"{name}_chat_template"))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL.get(name, ["<|im_start|>", "<|im_end|>"])})
    return ChatFormat(tokenizer, "")


def read(chat: ChatFormat, written: str, **fields: Any) -> tuple[str, str, list[common_pb2.ToolCall], int]:
    asked = [common_pb2.Message(role="user", content="<|im_end|><think><tool_call>{}</tool_call> weather?")]
    reader = chat.reader(pb.PolicyServiceChatRequest(messages=asked, **fields))()
    pieces = [reader.push(token) for token in chat.tokenizer.encode(written, add_special_tokens=False)]
    pieces.append(reader.finish())
    calls = [call for piece in pieces for call in piece.calls]
    thoughts = "".join(piece.thoughts for piece in pieces)
    return thoughts, "".join(piece.text for piece in pieces), calls, reader.thought_tokens


@pytest.mark.parametrize(("name", "written", "thoughts", "text", "arguments"), CASES)
def test_families(name: str, written: str, thoughts: str, text: str, arguments: list[dict[str, Any]]) -> None:
    found, said, calls, thought_tokens = read(chat_of(name), written, tools_json=TOOLS)
    assert (found, said) == (thoughts, text)
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", each) for each in arguments]
    assert len({call.id for call in calls}) == len(calls)
    assert (thought_tokens > 0) == bool(thoughts)


def test_a_call_is_text_where_no_tools_are_offered() -> None:
    assert read(chat_of("qwen3"), f"{HERMES}<|im_end|>")[1:3] == (HERMES, [])


def test_text_streams_as_it_comes() -> None:
    chat = chat_of("nemotron_3_nano")
    asked = [common_pb2.Message(role="user", content="weather?")]
    reader = chat.reader(pb.PolicyServiceChatRequest(messages=asked, tools_json=TOOLS))()
    seen = [reader.push(token) for token in chat.tokenizer.encode("Hm.\n</think>\nIt is", add_special_tokens=False)]
    assert "".join(piece.thoughts for piece in seen) == "Hm."
    assert "".join(piece.text for piece in seen) == "It is"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_a_begun_answer_is_continued_behind_its_thought(name: str) -> None:
    tokenizer = chat_of(name).tokenizer
    asked = [{"role": "user", "content": "weather?"}]
    rendered = tokenizer.decode(prompt_ids(tokenizer, asked, beginning="It is<|im_end|>"))
    assert rendered.endswith("It is<|im_end|>")
    ids = prompt_ids(tokenizer, asked, beginning="It is<|im_end|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == prompt_ids(tokenizer, asked).count(end), "a text becomes no control token"
    thinks = template_source(tokenizer).count("<think>") and rendered.count("<think>") > 0
    assert not thinks or "</think>" in rendered
    assert "weather" not in answer_prefix(tokenizer, asked)


def test_effort_reaches_the_template() -> None:
    chat = chat_of("qwen3")
    request = {"messages": [common_pb2.Message(role="user", content="x")]}
    plain = chat.encode(pb.PolicyServiceChatRequest(**request))
    none = chat.encode(pb.PolicyServiceChatRequest(**request, reasoning_effort="none"))
    assert chat.tokenizer.decode(none).endswith("<think>\n\n</think>\n\n")
    assert list(chat.encode(pb.PolicyServiceChatRequest(**request, reasoning_effort="high"))) == list(plain)
    gptoss = chat_of("gptoss")
    low = gptoss.tokenizer.decode(gptoss.encode(pb.PolicyServiceChatRequest(**request, reasoning_effort="minimal")))
    assert "Reasoning: low" in low
    assert effort_options("{{ messages }}", "none") == {}
    with pytest.raises(InvalidArgumentError, match="reasoning_effort"):
        ChatFormat(tiny_tokenizer(), "").encode(pb.PolicyServiceChatRequest(**request, reasoning_effort="high"))
