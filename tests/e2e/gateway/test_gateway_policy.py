"""The gateway before a real policy service: what only a real engine can show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from transformers import AutoTokenizer

from services.gateway.testing import gateway_config, running_gateway

MESSAGES = [{"role": "user", "content": "hello there"}]
ORDER = {
    "type": "object",
    "properties": {"number": {"type": "integer"}, "urgent": {"type": "boolean"}},
    "required": ["number", "urgent"],
    "additionalProperties": False,
}
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_order", "parameters": ORDER}},
    {"type": "function", "function": {"name": "paint", "parameters": COLOUR}},
]


@pytest.fixture
def endpoint(cluster: Any, tiny_model: Path) -> str:
    cluster.start_policy(tiny_model)
    return cluster.endpoints["policy"][0]


async def test_constrained_answers_seeds_and_log_probabilities(endpoint: str) -> None:
    async with (
        running_gateway(gateway_config(endpoint)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):

        async def ask(**changes: Any) -> Any:
            body = {"model": "steersman", "messages": MESSAGES, "max_tokens": 120, "seed": 3, **changes}
            return await client.chat.completions.create(**body)

        form = {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER}}
        said = (await ask(response_format=form)).choices[0].message.content
        jsonschema.validate(json.loads(said), ORDER)

        (call,) = (await ask(tools=TOOLS, tool_choice="required")).choices[0].message.tool_calls
        schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}[call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), schema)

        named = {"type": "function", "function": {"name": "paint"}}
        for stream in (False, True):
            answer = await ask(tools=TOOLS, tool_choice=named, stream=stream)
            if stream:
                deltas = [chunk.choices[0].delta async for chunk in answer if chunk.choices]
                (call,) = [call for delta in deltas for call in delta.tool_calls or []]
                assert not any(delta.content for delta in deltas)
            else:
                (call,) = answer.choices[0].message.tool_calls
                assert answer.choices[0].message.content is None
                assert answer.choices[0].finish_reason == "tool_calls"
            assert call.function.name == "paint"
            jsonschema.validate(json.loads(call.function.arguments), COLOUR)

        first, again, other = [await ask(max_tokens=12, seed=seed, n=2) for seed in (5, 5, 6)]
        texts = [[choice.message.content for choice in answer.choices] for answer in (first, again, other)]
        assert texts[0] == texts[1] != texts[2]

        whole = await ask(max_tokens=12, logprobs=True, top_logprobs=2, temperature=0)
        streamed: list[Any] = []
        said = ""
        async for chunk in await ask(max_tokens=12, logprobs=True, top_logprobs=2, temperature=0, stream=True):
            said += chunk.choices[0].delta.content or ""
            streamed += chunk.choices[0].logprobs.content
        assert said == whole.choices[0].message.content
        assert [token.model_dump() for token in streamed] == [
            token.model_dump() for token in whole.choices[0].logprobs.content
        ]
        assert len(streamed) == whole.usage.completion_tokens == 12

        # A model may have written arguments that are no JSON; sending them back is no error of the server.
        call = {"id": "1", "type": "function", "function": {"name": "paint", "arguments": "{'colour'"}}
        turns = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]
        turns.append({"role": "tool", "tool_call_id": "1", "content": "wrong"})
        assert (await ask(messages=turns, max_tokens=4)).usage.completion_tokens == 4
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
            body = {"model": "steersman", "messages": MESSAGES, "response_format": form}
            refused = await http.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_overflow_references_and_penalties(endpoint: str) -> None:
    async with (
        running_gateway(gateway_config(endpoint)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):

        async def ask(**changes: Any) -> Any:
            body = {"model": "steersman", "messages": MESSAGES, "max_tokens": 60, "seed": 3, **changes}
            return await client.chat.completions.create(**body)

        with pytest.raises(openai.BadRequestError) as caught:
            await ask(messages=[{"role": "user", "content": "hello " * 15_000}])
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"

        city = {"type": "object", "properties": {"c": {"$ref": "#/definitions/city"}}, "definitions": {"city": COLOUR}}
        again = {"type": "object", "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#"}}, "required": ["v"]}
        for parameters in (city, again):
            tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
            choice = (await ask(tools=[tool], tool_choice="required", max_tokens=400)).choices[0]
            if choice.finish_reason == "length":  # a random model may go on nesting
                assert parameters is again
                continue
            (call,) = choice.message.tool_calls
            jsonschema.validate(json.loads(call.function.arguments), parameters)

        forced = await ask(temperature=0, max_tokens=3, logit_bias={"100": 100}, logprobs=True)
        assert len({token.token for token in forced.choices[0].logprobs.content}) == 1


async def test_begun_answers_token_ids_and_responses(endpoint: str, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    async with (
        running_gateway(gateway_config(endpoint)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        greedy: dict[str, Any] = {"model": "steersman", "temperature": 0, "max_tokens": 12}
        text = "once upon a time"
        plain = await client.completions.create(prompt=text, **greedy)
        ids = tokenizer.encode(text)
        by_ids = await client.completions.create(prompt=ids, echo=True, **greedy)
        assert by_ids.choices[0].text == tokenizer.decode(ids) + plain.choices[0].text
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(prompt=[len(tokenizer) + 5], **greedy)

        # An answer that is begun with its own beginning goes on as it did.
        whole = (await client.chat.completions.create(messages=MESSAGES, **greedy)).choices[0].message.content or ""
        begun: list[Any] = [*MESSAGES, {"role": "assistant", "content": whole[:4]}]
        rest = (await client.chat.completions.create(messages=begun, **greedy)).choices[0].message.content or ""
        size = len(whole) - 4
        assert rest[:size] == whole[4:]
        response = await client.responses.create(
            model="steersman", input="hello there", temperature=0, max_output_tokens=12
        )
        assert response.output_text == whole
        assert response.usage is not None
        assert response.usage.output_tokens == 12
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(messages=MESSAGES, reasoning_effort="high", **greedy)
        assert (caught.value.param, caught.value.code) == ("reasoning_effort", "unsupported")
