"""Answers that must be a tool call: the schema that they are constrained to, and what becomes of their text."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence

import jsonschema
import llguidance
import pytest

from services.gateway.errors import BadRequestError
from services.gateway.openai.schema import Tool
from services.gateway.openai.translate import call_schema
from services.gateway.tools.calls import as_calls, one_call
from steersman.v1 import common_pb2
from steersman.v1.policy_pb2 import PolicyServiceChatResponse

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


def tool(name: str, parameters: dict | None) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


def nested(kind: str) -> dict:
    """As pydantic writes it: a definition of the same name in every tool."""
    item = {"type": "object", "properties": {"x": {"type": kind}}, "required": ["x"], "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"item": {"$ref": "#/$defs/Item"}},
        "required": ["item"],
        "$defs": {"Item": item},
    }


@pytest.mark.parametrize(
    ("call", "valid"),
    [
        ({"name": "a", "arguments": {"item": {"x": 1}}}, True),
        ({"name": "b", "arguments": {"item": {"x": "one"}}}, True),
        ({"name": "none", "arguments": {}}, True),
        ({"name": "a", "arguments": {"item": {"x": "one"}}}, False),
        ({"name": "b", "arguments": {"item": {"x": 1}}}, False),
        ({"name": "c", "arguments": {}}, False),
        ({"name": "a"}, False),
        ({"name": "none", "arguments": {"any": 1}}, False),
    ],
)
def test_the_schema_admits_calls_of_the_offered_tools_only(call: dict, valid: bool) -> None:
    tools = [tool("a", nested("integer")), tool("b", nested("string")), tool("none", None)]
    assert jsonschema.Draft202012Validator(json.loads(call_schema(tools))).is_valid(call) == valid


async def _calls(parts: Sequence[tuple[int, str, common_pb2.FinishReason]]) -> list[PolicyServiceChatResponse]:
    async def stream() -> AsyncGenerator[PolicyServiceChatResponse, None]:
        for index, delta, finish in parts:
            yield PolicyServiceChatResponse(choice_index=index, delta=delta, finish_reason=finish)

    return [response async for response in as_calls(stream())]


async def test_the_text_becomes_the_call_of_its_choice() -> None:
    got = await _calls(
        [
            (0, '{"name": "a", ', 0),
            (1, '{"name": "b", "arguments": {}}', STOP),
            (0, '"arguments": {"x": 1}}', STOP),
        ]
    )
    assert [response.delta for response in got] == ["", "", ""]
    assert [[(call.name, call.arguments) for call in response.tool_calls] for response in got] == [
        [],
        [("b", "{}")],
        [("a", '{"x": 1}')],
    ]
    assert got[1].finish_reason == got[2].finish_reason == common_pb2.FINISH_REASON_TOOL_CALLS
    assert got[1].tool_calls[0].id != got[2].tool_calls[0].id


async def test_a_call_that_was_cut_off_stays_text() -> None:
    got = await _calls([(0, '{"name": "a", ', 0), (0, '"argu', LENGTH)])
    assert (got[-1].delta, list(got[-1].tool_calls)) == ('{"name": "a", "argu', [])
    assert got[-1].finish_reason == LENGTH


CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        (
            {"type": "object", "properties": {"c": {"$ref": "#/definitions/city"}}, "definitions": {"city": CITY}},
            {"c": {"name": "Rome"}},
            {"c": {"name": 1}},
        ),
        (
            {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}}},
            {"v": 1, "next": {"v": 2, "next": {"v": 3}}},
            {"next": {"next": {"v": "x"}}},
        ),
        (
            {"type": "object", "properties": {"a": CITY, "b": {"$ref": "#/properties/a"}}},
            {"b": {"name": "x"}},
            {"b": {"name": 2}},
        ),
        (
            {"type": "object", "properties": {"$ref": {"const": {"$ref": "#/x"}}}},
            {"$ref": {"$ref": "#/x"}},
            {"$ref": 1},
        ),
    ],
)
def test_references_go_where_the_schema_goes(parameters: dict, good: dict, bad: dict) -> None:
    schema = json.loads(call_schema([tool("f", parameters), tool("g", parameters)]))
    validator = jsonschema.Draft202012Validator(schema)
    for name in ("f", "g"):
        assert validator.is_valid({"name": name, "arguments": good})
        assert not validator.is_valid({"name": name, "arguments": bad})
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    assert llguidance.LLMatcher.validate_grammar(grammar, None) == ""


@pytest.mark.parametrize("ref", ["http://127.0.0.1:9/x", "#/$defs/none", "#anchor", "other.json"])
def test_references_that_lead_nowhere_are_refused_by_name(ref: str) -> None:
    parameters = {"type": "object", "properties": {"a": {"$ref": ref}}}
    with pytest.raises(BadRequestError, match=r"\$ref") as caught:
        call_schema([tool("f", parameters)])
    assert caught.value.details["param"] == "tools.0.function.parameters"


async def test_one_call_a_turn() -> None:
    calls = [common_pb2.ToolCall(id=str(i), name="f", arguments="{}") for i in range(3)]

    async def stream() -> AsyncGenerator[PolicyServiceChatResponse, None]:
        yield PolicyServiceChatResponse(tool_calls=calls[:2])
        yield PolicyServiceChatResponse(choice_index=1, tool_calls=calls, finish_reason=STOP)
        yield PolicyServiceChatResponse(tool_calls=calls[2:], finish_reason=STOP)

    kept = [[call.id for call in response.tool_calls] async for response in one_call(stream())]
    assert kept == [["0"], ["0"], []]
