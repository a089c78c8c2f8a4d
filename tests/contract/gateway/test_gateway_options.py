"""What clients ask for beside a plain chat: prefill, echo, token ids, thoughts, details of usage, other origins."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa

from services.gateway.server import Gateway
from services.gateway.testing import gateway_config, running_gateway
from steersman.store.models import Answer
from steersman.testing.fake_policy import FakePolicy, serve_policy

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]


async def test_the_assistants_beginning_is_continued(
    client: openai.AsyncOpenAI, gateway: Gateway, policy: FakePolicy
) -> None:
    policy.reply = lambda request: " 42."
    begun: list[Any] = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    answer = await client.chat.completions.create(
        model="steersman", messages=begun, extra_body={"conversation_id": "c1"}
    )
    assert answer.choices[0].message.content == " 42."
    assert policy.requests[0].continue_last
    with gateway.store.reading() as session:
        stored = session.scalars(sa.select(Answer)).one()
    assert (stored.answer, [turn["role"] for turn in stored.prompt]) == ("The answer is 42.", ["user"])
    assert stored.token_ids is None
    await client.chat.completions.create(model="steersman", messages=HELLO, extra_body={"conversation_id": "c1"})
    assert [m.content for m in policy.requests[1].messages] == ["hello there", "The answer is 42.", "hello there"]
    assert not policy.requests[1].continue_last
    plain = {"continue_final_message": False}
    await client.chat.completions.create(model="steersman", messages=begun, extra_body=plain)
    assert not policy.requests[2].continue_last
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        await client.chat.completions.create(
            model="steersman", messages=HELLO, extra_body={"continue_final_message": True}
        )


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_and_token_ids(client: openai.AsyncOpenAI, policy: FakePolicy, stream: bool) -> None:
    async def texts(**fields: Any) -> dict[int, str]:
        found: dict[int, str] = {}
        answer = await client.completions.create(model="steersman", stream=stream, **fields)
        parts = [chunk async for chunk in answer] if stream else [answer]
        for choice in (choice for part in parts for choice in part.choices):
            found[choice.index] = found.get(choice.index, "") + choice.text
        return found

    assert await texts(prompt="one two", echo=True) == {0: "one two echo one two"}
    assert await texts(prompt=[3, 4, 5]) == {0: " echo 3 4 5"}
    assert list(policy.requests[-1].prompt_token_ids) == [3, 4, 5]
    assert await texts(prompt=[3, 4], echo=True, n=2) == {0: "3 4 echo 3 4", 1: "3 4 echo 3 4 (1)"}
    if not stream:
        assert await texts(prompt=[[3], [4, 5]]) == {0: " echo 3", 1: " echo 4 5"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": [-1]},
        {"prompt": [1, "a"]},
        {"prompt": []},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "echo": True, "logprobs": 1, "n": 2},
        {"prompt": ["a" * 60_000] * 2, "echo": True, "logprobs": 1},
    ],
)
async def test_wrong_prompts_are_refused(client: openai.AsyncOpenAI, wrong: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model="steersman", **wrong)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_tells_those_of_the_prompt(
    client: openai.AsyncOpenAI, policy: FakePolicy, stream: bool
) -> None:
    async def choices(**fields: Any) -> list[tuple[str, dict[str, list[Any]], str]]:
        found: dict[int, tuple[str, dict[str, list[Any]], str]] = {}
        answer = await client.completions.create(model="steersman", stream=stream, echo=True, **fields)
        parts = [chunk async for chunk in answer] if stream else [answer]
        for choice in (choice for part in parts for choice in part.choices):
            text, columns, _ = found.get(choice.index, ("", {}, ""))
            for name, column in choice.logprobs.model_dump().items():
                columns[name] = columns.get(name, []) + column
            found[choice.index] = text + choice.text, columns, choice.finish_reason
        if not stream:
            made = sum(len(text.split()) for text, _, _ in found.values()) - answer.usage.prompt_tokens
            assert answer.usage.completion_tokens == made
        return [found[index] for index in sorted(found)]

    ((text, found, _),) = await choices(prompt="äh two", logprobs=2, max_tokens=2)
    assert text == "äh two echo äh"
    assert found["tokens"] == ["äh", " two", " echo", " äh"]
    assert found["text_offset"] == [0, 2, 6, 11]
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    for token, logprob, top in list(
        zip(*(found[name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    )[1:]:
        assert top == {token: logprob, f"{token}1": pytest.approx(logprob - 1)}
    many = " ".join(f"w{place}" for place in range(700))
    ((text, found, reason),) = await choices(prompt=many, logprobs=0, max_tokens=0)
    assert (text, reason) == (many, "length")
    assert [many[at:].startswith(token) for at, token in zip(found["text_offset"], found["tokens"], strict=True)] == [
        True
    ] * 700
    assert policy.requests[-1].sampling.max_new_tokens == 1
    ((text, found, _),) = await choices(prompt=[3, 44], logprobs=1, max_tokens=1)
    assert (text, found["tokens"], found["text_offset"]) == ("3 44 echo", ["3", " 44", " echo"], [0, 1, 4])
    if not stream:
        several = await choices(prompt=[[3], [4, 5]], logprobs=1, max_tokens=1)
        assert [(text, found["tokens"]) for text, found, _ in several] == [
            ("3 echo", ["3", " echo"]),
            ("4 5 echo", ["4", " 5", " echo"]),
        ]


async def test_a_foreign_server_tells_the_prompts_log_probabilities(gateway: Gateway) -> None:
    """Before another server of that kind, which is a gateway as well: what it tells is told on."""
    body = {"model": "steersman", "echo": True, "logprobs": 2, "max_tokens": 2, "seed": 1}
    many = " ".join(f"w{place}" for place in range(600))
    async with (
        running_gateway(gateway_config(gateway.url, policy={"kind": "openai"})) as outer,
        httpx.AsyncClient(timeout=60) as http,
    ):
        for prompt in ("one two", [3, 44], many):
            there, here = [
                (await http.post(f"{url}/v1/completions", json=body | {"prompt": prompt})).json()["choices"]
                for url in (gateway.url, outer.url)
            ]
            assert here == there
        assert len(here[0]["logprobs"]["tokens"]) == 602


async def test_an_engine_that_passes_over_the_prompt_is_no_answer(
    client: openai.AsyncOpenAI, policy: FakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_before = FakePolicy._answer

    def answer(self: FakePolicy, request: Any, context: Any) -> Any:
        request.prompt_logprobs = False  # as a service that does not know the field
        return of_before(self, request, context)

    monkeypatch.setattr(FakePolicy, "_answer", answer)
    with pytest.raises(openai.BadRequestError, match="no log-probabilities of this prompt"):
        await client.completions.create(model="steersman", prompt="one", echo=True, logprobs=1)


async def test_thoughts_are_apart_from_the_answer(client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    policy.thoughts = "Hm, a greeting."
    answer = await client.chat.completions.create(model="steersman", messages=HELLO, reasoning_effort="low")
    assert policy.requests[0].reasoning_effort == "low"
    message = answer.choices[0].message
    assert message.content == "You said: hello there"
    assert message.reasoning_content == "Hm, a greeting."  # type: ignore[attr-defined]
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    thoughts, said = "", ""
    async for chunk in await client.chat.completions.create(model="steersman", messages=HELLO, stream=True):
        delta = chunk.choices[0].delta
        thoughts += getattr(delta, "reasoning_content", None) or ""
        said += delta.content or ""
    assert (thoughts, said) == ("Hm, a greeting.", "You said: hello there")
    # What a client sends back of it goes to the model.
    again = [*HELLO, {"role": "assistant", "content": said, "reasoning_content": thoughts}, *HELLO]
    await client.chat.completions.create(model="steersman", messages=again)
    assert policy.requests[-1].messages[1].reasoning_content == thoughts


async def test_harmless_parts_are_taken_without_effect(client: openai.AsyncOpenAI) -> None:
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral", "ttl": "5m"}}
    said = [
        {"role": "user", "content": [part]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    answer = await client.chat.completions.create(
        model="steersman",
        messages=[*said, *HELLO],
        verbosity="low",
        modalities=["text"],
        store=True,
        metadata={"a": "b"},
    )
    assert answer.choices[0].message.content == "You said: hello there"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="steersman", messages=HELLO, modalities=["audio"])
    assert caught.value.param == "modalities.0"


async def test_other_origins_by_configuration() -> None:
    shop, asks = "https://shop.example.com", {"access-control-request-method": "POST"}
    headers = {**asks, "access-control-request-headers": "authorization,content-type,idempotency-key"}
    body = {"model": "steersman", "messages": HELLO}
    async with serve_policy(FakePolicy()) as endpoint:
        cors = {"origins": [shop]}
        async with (
            running_gateway(gateway_config(endpoint, cors=cors)) as gateway,
            httpx.AsyncClient(base_url=gateway.url) as http,
        ):
            asked = await http.options("/v1/responses", headers={"origin": shop, **headers})
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == shop
            assert "idempotency-key" in asked.headers["access-control-allow-headers"]
            assert "access-control-allow-credentials" not in asked.headers
            answered = await http.post("/v1/chat/completions", json=body, headers={"origin": shop})
            assert answered.headers["access-control-allow-origin"] == shop
            refused = await http.post("/v1/chat/completions", json={}, headers={"origin": shop})
            assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, shop)
            stranger = await http.options("/v1/responses", headers={"origin": "https://evil.example", **headers})
            assert stranger.status_code == 400
            told = await http.post("/v1/chat/completions", json=body, headers={"origin": "https://evil.example"})
            assert "access-control-allow-origin" not in told.headers
        async with (
            running_gateway(gateway_config(endpoint)) as gateway,
            httpx.AsyncClient(base_url=gateway.url) as http,
        ):
            asked = await http.options("/v1/responses", headers={"origin": shop, **headers})
            assert "access-control-allow-origin" not in asked.headers
