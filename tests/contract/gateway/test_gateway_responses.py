"""The stock `openai` client's Responses API against the gateway."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
import sqlalchemy as sa
from gateway_records import running_shop, signed
from openai.types.responses import Response, ResponseStreamEvent

from services.gateway.auth.keys import create_key
from services.gateway.server import Gateway
from services.gateway.store import Audit, KeyUse, open_store
from services.gateway.testing import gateway_config, running_gateway, until
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import common_pb2

TOOL = {"type": "function", "name": "get_order", "parameters": {"type": "object"}, "strict": False}
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


async def events_of(gateway: Gateway, **body: Any) -> list[dict[str, Any]]:
    """What is sent, each event valid, by the client's own types and strictly numbered."""
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as http:
        sent = await http.post("/v1/responses", json={"model": "steersman", "stream": True, **body})
    assert sent.headers["content-type"].startswith("text/event-stream"), sent.text
    events = []
    for number, block in enumerate(sent.text.strip().split("\n\n")):
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        assert event["sequence_number"] == number
        assert EVENT.validate_python(event, strict=False).type == event["type"]
        events.append(event)
    return events


async def test_answers_a_text(client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    response = await client.responses.create(
        model="steersman", input="hello there", instructions="be kind", metadata={"shop": "7"}, temperature=0.5
    )
    assert response.output_text == "You said: hello there"
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.id.startswith("resp_")
    assert response.metadata == {"shop": "7"}
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (4, 4, 8)
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    Response.model_validate(response.model_dump(), strict=True)
    assert [(m.role, m.content) for m in policy.requests[0].messages] == [
        ("system", "be kind"),
        ("user", "hello there"),
    ]
    assert policy.requests[0].sampling.temperature == 0.5

    short = await client.responses.create(model="steersman", input="hello there", max_output_tokens=2)
    assert (short.status, short.output_text) == ("incomplete", "You said:")
    assert short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"


async def test_events_come_in_order(gateway: Gateway, policy: FakePolicy) -> None:
    policy.thoughts = "hm"
    events = await events_of(gateway, input="hello there")
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", *["output_text.delta"] * 4,
        "output_text.done", "content_part.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    done = events[-1]["response"]
    assert [item["type"] for item in done["output"]] == ["reasoning", "message"]
    assert done["output"] == [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [e["output_index"] for e in events if "output_index" in e] == [0] * 6 + [1] * 9
    assert done["usage"]["output_tokens_details"] == {"reasoning_tokens": 1}
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []


async def test_streams_to_the_client(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="steersman", input="hello there") as stream:
        said = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(said) == final.output_text == "You said: hello there"
    assert (await client.responses.retrieve(final.id)).output_text == final.output_text


async def test_the_length_limit_ends_a_stream_as_incomplete(gateway: Gateway) -> None:
    events = await events_of(gateway, input="hello there", max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"
    assert events[-2]["item"]["status"] == "incomplete"


async def test_calls_tools_over_two_turns(client: openai.AsyncOpenAI, gateway: Gateway, policy: FakePolicy) -> None:
    call = common_pb2.ToolCall(id="call-1", name="get_order", arguments='{"id": 2}')
    second = common_pb2.ToolCall(id="call-2", name="get_order", arguments='{"id": 3}')
    policy.reply = lambda request: [call, second]
    first = await client.responses.create(model="steersman", input="my orders?", tools=[TOOL])
    assert [(item.type, item.call_id, item.arguments) for item in first.output] == [
        ("function_call", "call-1", '{"id": 2}'), ("function_call", "call-2", '{"id": 3}'),
    ]  # fmt: skip
    assert json.loads(policy.requests[0].tools_json)[0]["function"]["name"] == "get_order"

    streamed = await events_of(gateway, input="my orders?", tools=[TOOL])
    assert [e["type"].removeprefix("response.") for e in streamed[2:6]] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    assert [e["item"]["call_id"] for e in streamed if e["type"] == "response.output_item.done"] == ["call-1", "call-2"]

    policy.reply = lambda request: "They are shipped."
    outputs = [{"type": "function_call_output", "call_id": f"call-{n}", "output": "shipped"} for n in (1, 2)]
    # By the stored response, by its items, and by references to them: the model is shown the same.
    ways: list[dict[str, Any]] = [
        {"previous_response_id": first.id, "input": outputs},
        {"input": [{"role": "user", "content": "my orders?"}, *first.output, *outputs]},
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "my orders?"}]},
                *({"type": "item_reference", "id": item.id} for item in first.output),
                *outputs,
            ]
        },
    ]
    for way in ways:
        last = await client.responses.create(model="steersman", tools=[TOOL], **way)
        assert last.output_text == "They are shipped."
        seen = policy.requests[-1].messages
        assert [message.role for message in seen] == ["user", "assistant", "tool", "tool"]
        assert [c.id for c in seen[1].tool_calls] == ["call-1", "call-2"]
        assert [m.tool_call_id for m in seen[2:]] == ["call-1", "call-2"]


async def test_required_tools_and_structured_output(client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    policy.reply = lambda request: '{"name": "get_order", "arguments": {"id": 5}}'
    choice = {"type": "function", "name": "get_order"}
    called = await client.responses.create(model="steersman", input="order 5", tools=[TOOL], tool_choice=choice)
    assert [(i.type, i.name, i.arguments) for i in called.output] == [("function_call", "get_order", '{"id": 5}')]

    class Order(pydantic.BaseModel):
        number: int

    policy.reply = lambda request: '{"number": 7}'
    parsed = await client.responses.parse(model="steersman", input="order 7", text_format=Order)
    assert parsed.output_parsed == Order(number=7)
    schema = json.loads(policy.requests[-1].json_schema)
    assert schema["properties"]["number"]["type"] == "integer"


async def test_continues_what_was_stored(client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    first = await client.responses.create(model="steersman", input="one", instructions="be kind")
    second = await client.responses.create(model="steersman", input="two", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    # Instructions are of one answer only; a conversation branches wherever one continues it.
    assert [m.content for m in policy.requests[1].messages] == ["one", "You said: one", "two"]
    await client.responses.create(model="steersman", input="three", previous_response_id=first.id)
    assert [m.content for m in policy.requests[2].messages] == ["one", "You said: one", "three"]

    items = await client.responses.input_items.list(first.id)
    assert [(item.role, item.content[0].text) for item in items.data] == [("user", "one")]  # type: ignore[union-attr]
    await client.responses.delete(first.id)
    for gone in (client.responses.retrieve(first.id), client.responses.delete(first.id)):
        with pytest.raises(openai.NotFoundError):
            await gone
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.create(model="steersman", input="two", previous_response_id=first.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    assert (await client.responses.retrieve(second.id)).output_text == "You said: two"


async def test_store_false_keeps_nothing(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="steersman", input="hello", store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)


async def test_reports_log_probabilities(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    response = await client.responses.create(
        model="steersman", input="hello there", include=["message.output_text.logprobs"], top_logprobs=2
    )
    logprobs = response.output[0].content[0].logprobs  # type: ignore[union-attr]
    assert [token.token for token in logprobs] == ["You", " said:", " hello", " there"]
    assert all(len(token.top_logprobs) == 2 for token in logprobs)
    events = await events_of(gateway, input="hello there", top_logprobs=2)
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert [token["token"] for token in done["logprobs"]] == ["You", " said:", " hello", " there"]


async def test_a_stream_can_be_cancelled(gateway: Gateway, client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    policy.seconds_per_token, policy.reply = 0.05, lambda request: "word " * 400
    stream = await client.responses.create(model="steersman", input="talk", stream=True)
    kinds, response_id = [], ""
    async for event in stream:
        kinds.append(event.type)
        if event.type == "response.created":
            response_id = event.response.id
        if event.type == "response.output_text.delta" and kinds.count(event.type) == 2:
            cancelled = await client.responses.cancel(response_id)
            assert cancelled.status == "cancelled"
            assert cancelled.output_text.startswith("word word")
    assert kinds[-1] == "response.incomplete"
    await until(lambda: policy.cancelled == 1)
    assert policy.running == 0
    ended = await client.responses.create(model="steersman", input="hi", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="has ended"):
        await client.responses.cancel(ended.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.cancel("resp_unknown")


async def test_a_client_that_goes_away_ends_the_answer(client: openai.AsyncOpenAI, policy: FakePolicy) -> None:
    policy.seconds_per_token, policy.reply = 0.05, lambda request: "word " * 400
    stream = await client.responses.create(model="steersman", input="talk", stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    await until(lambda: policy.cancelled == 1)


async def test_a_stream_that_breaks_ends_as_failed(gateway: Gateway, policy: FakePolicy) -> None:
    policy.fail_after_tokens = 2
    events = await events_of(gateway, input="hello there my friend")
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert events[-1]["response"]["status"] == "failed"


async def test_idempotency_quotas_and_audit(policy: FakePolicy, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    key = create_key(store, "acme", ["chat"], tokens_per_day=20)
    other = create_key(store, "other", ["chat"])
    config = {"database": database, "requireApiKey": True}
    async with serve_policy(policy) as endpoint, running_gateway(gateway_config(endpoint, **config)) as gateway:
        base = f"{gateway.url}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as client:
            again = {"extra_headers": {"idempotency-key": "k1", "x-request-id": "r1"}, "max_output_tokens": 9}
            first = await client.responses.create(model="steersman", input="hello", **again)
            stream = await client.responses.create(model="steersman", input="hello", stream=True, **again)
            (done,) = [event.response async for event in stream if event.type == "response.completed"]
            assert (done.id, done.output) == (first.id, first.output)
            assert len(policy.requests) == 1
            with pytest.raises(openai.ConflictError):
                await client.responses.create(model="steersman", input="other", **again)
            # A stored response is its tenant's; a key of another one does not see it.
            async with openai.AsyncOpenAI(base_url=base, api_key=other, max_retries=0) as stranger:
                for asked in (
                    stranger.responses.retrieve(first.id),
                    stranger.responses.delete(first.id),
                    stranger.responses.create(model="steersman", input="x", previous_response_id=first.id),
                ):
                    with pytest.raises(openai.NotFoundError):
                        await asked
            await client.responses.delete(first.id)
            for _ in range(4):
                await client.responses.create(model="steersman", input="hello", max_output_tokens=9)
            with pytest.raises(openai.RateLimitError):
                await client.responses.create(model="steersman", input="hello", max_output_tokens=9)
        await until(lambda: gateway.assistant.recorder.backlog == 0)
        with store.reading() as session:
            lines = session.execute(sa.select(Audit.action, Audit.outcome, Audit.answer_id, Audit.request_id)).all()
            used = session.scalars(sa.select(KeyUse.tokens).where(KeyUse.tokens > 0)).all()
    assert ("answer", "stop", first.id, "r1") in lines
    assert ("replay", "replay", first.id, "r1") in lines
    assert ("forget", "deleted", first.id) in [line[:3] for line in lines]
    assert sum(used) >= 20


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"input": []}, "input"),
        ({"input": [{"role": "pirate", "content": "arr"}]}, "input.0.role"),
        ({"input": [{"type": "image_generation_call", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, None),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"conversation": "c1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"input": [{"type": "item_reference", "id": "msg_none"}]}, "input"),
    ],
)
async def test_refuses_by_name(client: openai.AsyncOpenAI, change: dict[str, Any], param: str | None) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        await client.responses.create(**{"model": "steersman", "input": "x", **change})  # type: ignore[call-overload]
    assert caught.value.param == param or (param is None and "tool_choice" in str(caught.value))


async def test_the_gateways_own_tools_are_carried_out_as_in_a_chat() -> None:
    """Their calls are no items of the response, the caller's own come back beside what was looked up, and a turn that
    continues sees the answer, not the record."""

    def reply(request: Any) -> Any:
        known = any(message.role == "tool" for message in request.messages)
        theirs = ["get_order"] if "get_order" in request.tools_json else []
        if known and not theirs:
            return "Order 2 is processing."
        names = theirs if known else ["find_order", *theirs]
        return [common_pb2.ToolCall(id=name, name=name, arguments='{"number": "2"}') for name in names]

    async with (
        running_shop(FakePolicy(reply=reply), tools={"mode": "tools"}) as shop,
        openai.AsyncOpenAI(
            base_url=f"{shop.gateway.url}/v1", api_key="none", max_retries=0, default_headers=signed("C-A")
        ) as client,
    ):
        async with client.responses.stream(model="steersman", input="where is order 2?") as stream:
            kinds = [event.type async for event in stream]
            first = await stream.get_final_response()
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        assert not [kind for kind in kinds if "function_call" in kind]
        assert first.output_text == "Order 2 is processing."
        told = first.model_dump()["steersman"]
        assert told["sources"] == [{"system": "erp", "record": "order/2"}]
        results = [m.content for m in shop.policy.requests[1].messages if m.role == "tool"]
        assert len(results) == 1
        assert "39.80" in results[0]
        more = await client.responses.create(model="steersman", input="thanks", previous_response_id=first.id)
        continued = [m for m in shop.policy.requests[2].messages if m.role != "system"]
        assert [(m.role, m.content) for m in continued[:2]] == [
            ("user", "where is order 2?"),
            ("assistant", "Order 2 is processing."),
        ]
        assert more.output_text == "Order 2 is processing."
        theirs = await client.responses.create(model="steersman", input="order 2", tools=[TOOL])  # type: ignore[list-item]
        assert [item.name for item in theirs.output if item.type == "function_call"] == ["get_order"]
        nobody = await client.responses.create(
            model="steersman", input="where is order 3?", extra_headers=signed("C-A")
        )
        assert "59.70" not in "".join(m.content for r in shop.policy.requests for m in r.messages)
        assert nobody.status == "completed"
