"""The stock `openai` client against the gateway."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import httpx
import openai
import pytest

from services.gateway.server import Gateway
from services.gateway.testing import gateway_config, running_gateway, until
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import common_pb2

HELLO = [{"role": "user", "content": "hello there"}]


async def test_answers_a_conversation(client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    answer = await client.chat.completions.create(
        model="steersman", messages=[{"role": "developer", "content": "be kind"}, *HELLO], temperature=0.5, seed=-1
    )
    assert answer.choices[0].message.content == "You said: hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 4, 8)
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint == "weights-1"
    request = policy.requests[0]
    assert [m.role for m in request.messages] == ["system", "user"]
    assert request.sampling.temperature == 0.5
    assert request.sampling.seed == 2**64 - 1
    assert request.sampling.max_new_tokens == 512


async def test_streams_with_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="steersman", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "You said: hello there"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    assert chunks[-1].choices == []


async def test_several_choices_stream_side_by_side(client: openai.AsyncOpenAI) -> None:
    texts: dict[int, str] = {}
    async for chunk in await client.chat.completions.create(model="steersman", messages=HELLO, stream=True, n=3):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    said = "You said: hello there"
    assert texts == {0: said, 1: f"{said} (1)", 2: f"{said} (2)"}


async def test_stop_length_and_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="steersman", messages=HELLO, stop=[" there"], logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.message.content == "You said: hello"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [t.token for t in choice.logprobs.content] == ["You", " said:", " hello"]
    assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in choice.logprobs.content)
    assert bytes(choice.logprobs.content[0].bytes or []) == b"You"

    short = await client.chat.completions.create(model="steersman", messages=HELLO, max_completion_tokens=2)
    assert short.choices[0].message.content == "You said:"
    assert short.choices[0].finish_reason == "length"


async def test_passes_tools_and_returns_calls(client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    policy.reply = lambda request: [common_pb2.ToolCall(id="call-1", name="get_order", arguments='{"id": 2}')]
    tool = {"type": "function", "function": {"name": "get_order", "parameters": {"type": "object"}}}
    answer = await client.chat.completions.create(model="steersman", messages=HELLO, tools=[tool])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.name == "get_order"
    assert '"get_order"' in policy.requests[0].tools_json

    stream = await client.chat.completions.create(model="steersman", messages=HELLO, tools=[tool], stream=True)
    calls = [c.choices[0].delta.tool_calls async for c in stream if c.choices and c.choices[0].delta.tool_calls]
    assert calls[0][0].function.arguments == '{"id": 2}'


async def test_continues_a_text(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="steersman", prompt=["one", "two"], max_tokens=9, logprobs=1)
    assert [(c.index, c.text) for c in answer.choices] == [(0, " echo one"), (1, " echo two")]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset == [0, 5]
    stream = await client.completions.create(model="steersman", prompt="three", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == " echo three"


async def test_lists_models_also_where_kserve_clients_look(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    assert [model.id async for model in client.models.list()] == ["steersman"]
    assert (await client.models.retrieve("steersman")).id == "steersman"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt")
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/openai/v1", api_key="none") as other:
        assert (await other.chat.completions.create(model="steersman", messages=HELLO)).choices


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pirate", "content": "arr"}]}, "messages.0.role"),
        ({"max_tokens": 1_000_000}, "max_tokens"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"50256": 101}}, "logit_bias.50256"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"extra_body": {"teleport": True}}, "teleport"),
    ],
)
async def test_names_the_wrong_field(client: openai.AsyncOpenAI, change: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**{"model": "steersman", "messages": HELLO, **change})
    assert caught.value.body["param"] == param
    assert caught.value.body["type"] == "invalid_request_error"


async def test_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"


async def test_request_id_comes_back(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        body = {"model": "steersman", "messages": HELLO}
        answer = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "abc-1"})
        assert answer.headers["x-request-id"] == "abc-1"
        forged = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "a b\tc"})
        assert forged.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_stops_the_generation(client: openai.AsyncOpenAI, policy: FakePolicy, stream: bool) -> None:
    policy.seconds_per_token = 0.05
    policy.reply = lambda request: "word " * 1000
    call = client.chat.completions.create(model="steersman", messages=HELLO, stream=stream, max_tokens=1000)
    if stream:
        answer = await call
        await anext(aiter(answer))
        await answer.close()
    else:
        task = asyncio.ensure_future(call)
        await until(lambda: policy.running == 1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await until(lambda: policy.running == 0)
    assert policy.cancelled == 1
    assert policy.tokens_sent < 100


async def test_error_after_the_first_token_ends_the_stream(client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    policy.fail_after_tokens = 2
    stream = await client.chat.completions.create(model="steersman", messages=HELLO, stream=True)
    said: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            said.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError, match="went away"):
        await read()
    assert "".join(said) == "You said:"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_another_replica_takes_over_before_the_first_token(code: grpc.StatusCode) -> None:
    broken, sound = FakePolicy(), FakePolicy()
    async with (
        serve_policy(broken) as one,
        serve_policy(sound) as two,
        running_gateway(gateway_config(one, two)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        broken.fail_with = code
        for _ in range(4):
            answer = await client.chat.completions.create(model="steersman", messages=HELLO)
            assert answer.choices[0].message.content == "You said: hello there"
        assert len(sound.requests) == 4
        assert len(broken.requests) >= 1


async def test_a_wrong_request_is_not_retried() -> None:
    refusing, idle = FakePolicy(fail_with=grpc.StatusCode.INVALID_ARGUMENT), FakePolicy()
    async with (
        serve_policy(refusing) as one,
        serve_policy(idle) as two,
        running_gateway(gateway_config(one, two)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="steersman", messages=HELLO)
    assert idle.requests == []


async def test_without_a_replica_it_is_not_ready_and_says_so() -> None:
    async with (
        running_gateway(gateway_config("127.0.0.1:9")) as gateway,
        httpx.AsyncClient(base_url=gateway.url) as http,
    ):
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 503
        answer = await http.post("/v1/chat/completions", json={"model": "steersman", "messages": HELLO})
        assert answer.status_code == 503
        assert "policy service" in answer.json()["error"]["message"]


async def test_readiness_follows_the_replica(policy: FakePolicy) -> None:
    async with serve_policy(policy) as endpoint:
        port = int(endpoint.rpartition(":")[2])
        gateway = Gateway(gateway_config(endpoint))
        await gateway.start()
        assert gateway.assistant.ready
    await until(lambda: not gateway.assistant.ready)
    async with serve_policy(policy, port):
        await until(lambda: gateway.assistant.ready)
    await gateway.drain()


async def test_penalties_reach_the_model(client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    await client.chat.completions.create(
        model="steersman", messages=HELLO, presence_penalty=0.5, frequency_penalty=-1.5, logit_bias={"7": -100}
    )
    sampling = policy.requests[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, dict(sampling.logit_bias)) == (0.5, -1.5, {7: -100})


async def test_a_wrong_value_is_said_in_one_sentence(client: openai.AsyncOpenAI) -> None:
    wrong = [{"role": "user", "content": 7}]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="steersman", messages=wrong)
    assert caught.value.body["message"] == "messages.0.content: must be a text or a list"


async def test_harmless_parts_are_ignored(client: openai.AsyncOpenAI) -> None:
    part = {"type": "text", "text": "hello there", "cache_control": {"type": "ephemeral"}}
    answer = await client.chat.completions.create(model="steersman", messages=[{"role": "user", "content": [part]}])
    assert answer.choices[0].message.content == "You said: hello there"


async def test_more_prompts_than_places(policy: FakePolicy) -> None:
    limits = {"concurrentAnswers": 2, "queuedAnswers": 2, "queueSeconds": 10}
    policy.seconds_per_token = 0.005
    async with (
        serve_policy(policy) as endpoint,
        running_gateway(gateway_config(endpoint, limits=limits)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any key at all", max_retries=0) as client,
    ):
        prompts = [f"p{i}" for i in range(64)]
        answer = await client.completions.create(model="steersman", prompt=prompts, max_tokens=9)
        assert [(c.index, c.text) for c in answer.choices] == [(i, f" echo p{i}") for i in range(64)]
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            assert [(await http.head(path)).status_code for path in ("/healthz", "/readyz")] == [200, 200]
