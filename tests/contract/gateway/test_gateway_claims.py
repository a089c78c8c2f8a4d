"""No statement about records without a record, through the public interface; constrained answers are grounded, too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_records import Shop, repeat_prompt, running_shop

from services.gateway.answer import Lookup, Source
from services.gateway.tools.claims import ground_of
from services.gateway.tools.reading import Reader, Wish
from steersman.testing.fake_policy import FakePolicy
from steersman.v1 import common_pb2, policy_pb2

HELD = "I have no record of that, so I cannot say anything about it."
FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "order",
        "schema": {"type": "object", "properties": {"state": {"type": "string"}, "total": {"type": "string"}}},
    },
}
THEIR_TOOL = {"type": "function", "function": {"name": "play_music", "parameters": {"type": "object"}}}


def saying(text: str) -> FakePolicy:
    return FakePolicy(reply=lambda request: text)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("what is the total of order 3?", "The total is 59.70 EUR."),
        ("what is the total of order 3?", "Your order 3 is paid."),
        ("is order 3 paid?", "Yes, it was paid on 2026-11-03."),
        ("hello", "Hello! Your order 3 has been shipped."),
        ("Wo ist Bestellung 3?", "Ihre Bestellung 3 wurde gestern versandt."),
        ("Où est ma commande 3 ?", "Votre commande 3 est en cours de livraison."),
        ("¿Dónde está mi pedido 3?", "Su pedido 3 fue entregado ayer."),
        ("Dov'è il mio ordine 3?", "Il suo ordine 3 è stato spedito."),
        ("订单3在哪里？", "您的订单3已发货。"),
        ("注文3はどこですか", "ご注文3は発送済みです。"),
        ("is it true that order 2 is mine?", "Order 2 is yours and order 3 is blocked."),
        ("do you have LAMP-9?", "Yes, we have 40 units left in stock."),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_statement_without_a_record_is_held_back(question: str, said: str, stream: bool) -> None:
    async with running_shop(saying(f"Thank you for asking. {said}")) as shop:
        if stream:
            body = {"model": "steersman", "messages": [{"role": "user", "content": question}], "stream": True}
            text = await _streamed(shop, {**body, "logprobs": True})
        else:
            text = await shop.say(question)
        assert said not in text
        assert HELD in text
        assert "Thank you for asking." in text
        held = shop.gateway.metrics.render().decode()
    assert 'steersman_gateway_claims_total{outcome="held"} 1.0' in held


async def _streamed(shop: Shop, body: dict[str, Any]) -> str:
    """All that a stream shows, the texts of its tokens included."""
    from gateway_records import signed

    shown = ""
    async with shop.http.stream("POST", "/v1/chat/completions", json=body, headers=signed("C-A")) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    shown += choice["delta"].get("content") or ""
                    shown += "".join(token["token"] for token in (choice["logprobs"] or {}).get("content") or ())
    return shown


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("where is order 2?", "Your order 2 is processing, the total is 39.80."),
        ("where is order SO-17?", "Order SO-17 was sent. It will arrive soon."),
        ("is CHAIR-1 in stock?", "Yes, 12 chairs are available."),
        ("where is order 3?", "I'm sorry, I cannot find order 3. Is the number right?"),
        ("where is order 3?", "Order 3 was not found."),
        ("Wo ist Bestellung 3?", "Die Bestellung 3 konnte ich leider nicht finden."),
        ("Où est ma commande 3 ?", "Je ne trouve pas la commande 3."),
        ("hello", "Hello! How can I help you? I can look up orders and invoices."),
        ("how do returns work?", "If your order is damaged, you can return it. It costs nothing."),
        ("订单3在哪里？", "没有找到订单3。"),
    ],
)
async def test_what_has_a_record_or_states_nothing_is_given(question: str, said: str) -> None:
    async with running_shop(saying(said)) as shop:
        body = await shop.ask(question)
    assert body["choices"][0]["message"]["content"] == said
    assert body["steersman"]["unsourced"] == 0


async def test_it_may_be_marked_or_allowed() -> None:
    said = "Your order 3 is paid. Bye."
    async with running_shop(saying(said), tools={"unsourced": "mark"}) as shop:
        body = await shop.ask("where is order 3?")
        assert body["choices"][0]["message"]["content"] == "Your order 3 is paid. [no record] Bye."
        assert body["steersman"]["unsourced"] == 1
    async with running_shop(saying(said), tools={"unsourced": "allow"}) as shop:
        assert await shop.say("where is order 3?") == said


async def test_what_the_application_says_itself_is_a_source() -> None:
    told = [{"role": "system", "content": "Order 9 is paid."}, {"role": "user", "content": "and order 9?"}]
    async with running_shop(saying("Your order 9 is paid.")) as shop:
        assert await shop.say("", messages=told) == "Your order 9 is paid."
    read = [Lookup("track", {}, "found", (Source("mcp", "track"),), "box 9")]
    ground = ground_of(Reader(), [Wish("order", None)], read, [])
    assert ground.judge("It was delivered.") == "sourced"
    assert ground.judge("Order 9 was delivered.") == "sourced"
    assert ground.judge("Order 8 was delivered.") == "unsourced"


# --- grounding and constraints together -------------------------------------------------------------------------


def _last(request: policy_pb2.PolicyServiceChatRequest) -> Any:
    """Calls the gateway's tool where it is offered, then repeats the prompt."""
    offered = request.tools_json and "find_order" in request.tools_json
    if offered and not any(message.role == "tool" for message in request.messages):
        return [common_pb2.ToolCall(id="1", name="find_order", arguments='{"number": "2"}')]
    return repeat_prompt(request)


@pytest.mark.parametrize("mode", ["lookup", "tools"])
@pytest.mark.parametrize("change", [{"response_format": FORM}, {"tools": [THEIR_TOOL]}, {"n": 2}], ids=str)
async def test_what_constrains_an_answer_does_not_switch_the_lookup_off(mode: str, change: dict[str, Any]) -> None:
    async with running_shop(FakePolicy(reply=_last), tools={"mode": mode, "unsourced": "allow"}) as shop:
        body = await shop.ask("where is order 2?", **change)
        request = shop.policy.requests[-1]
    assert len(body["choices"]) == change.get("n", 1)
    assert all("39.80" in choice["message"]["content"] for choice in body["choices"])
    assert body["steersman"]["sources"] == [{"system": "erp", "record": "order/2"}]
    assert bool(request.json_schema) == ("response_format" in change)
    assert ("play_music" in request.tools_json) == ("tools" in change)


@pytest.mark.parametrize("mode", ["lookup", "tools"])
async def test_a_form_that_leaves_no_room_to_say_so_is_refused_without_a_record(mode: str) -> None:
    async with running_shop(saying('{"state": "paid"}'), tools={"mode": mode}) as shop:
        refused = await shop.post("where is order 3?", response_format=FORM)
        assert refused.status_code == 404
        assert refused.json()["error"]["param"] == "response_format"
        assert "order 3" in refused.json()["error"]["message"]
        assert "59.70" not in refused.text
        # Nothing of records is asked here.
        assert await shop.say("write a haiku", response_format=FORM) == '{"state": "paid"}'


async def test_the_callers_calls_come_back_and_ours_are_carried_out() -> None:
    def both(request: policy_pb2.PolicyServiceChatRequest) -> Any:
        known = any(message.role == "tool" for message in request.messages)
        names = ["play_music"] if known else ["find_order", "play_music"]
        return [common_pb2.ToolCall(id=name, name=name, arguments="{}") for name in names]

    async with running_shop(FakePolicy(reply=both), tools={"mode": "tools"}) as shop:
        body = await shop.ask("my orders, and music", tools=[THEIR_TOOL])
        clash = {"type": "function", "function": {"name": "find_order", "parameters": {"type": "object"}}}
        refused = await shop.post("hello", tools=[clash])
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["play_music"]
    assert {"system": "erp", "record": "order/2"} in body["steersman"]["sources"]
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tools"


async def test_one_turn_carries_out_a_bounded_number_of_calls() -> None:
    def many(request: policy_pb2.PolicyServiceChatRequest) -> Any:
        if any(message.role == "tool" for message in request.messages):
            return "done"
        return [common_pb2.ToolCall(id=str(i), name="find_order", arguments="{}") for i in range(500)]

    async with running_shop(FakePolicy(reply=many), tools={"mode": "tools", "calls": 3}) as shop:
        assert await shop.say("hello") == "done"
        assert len(shop.business.asked) == 3


# --- hand-over ----------------------------------------------------------------------------------------------------


async def test_a_hand_over_never_replaces_an_answer_to_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_HOOK_SECRET", "h" * 40)
    desk = {"handOver": {"webhook": {"url": "http://127.0.0.1:9/hook", "secretEnv": "TEST_HOOK_SECRET"}}}
    async with running_shop(saying("Order 2 is processing."), tools=desk) as shop:
        for text in (
            "I do not want to talk to an agent, just tell me about order 2",
            "Please transfer invoice 2 to my colleague",
        ):
            body = await shop.ask(text)
            assert body["steersman"]["proposed_actions"] == []
            assert body["steersman"]["sources"]
        body = await shop.ask("I want to speak to a human being, please")
        assert [action["action"] for action in body["steersman"]["proposed_actions"]] == ["hand_over"]
        body = await shop.ask("Where is order 2? And please connect me to an agent.")
        assert [action["action"] for action in body["steersman"]["proposed_actions"]] == ["hand_over"]
        said = body["choices"][0]["message"]["content"]
        assert said.startswith("Order 2 is processing.\n\nI can hand this conversation over")
