"""What was said stays what was said: facts reach the model and the evidence, not the stored prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from gateway_records import Shop, running_shop

from services.gateway.answer import Answer
from services.gateway.store import Conversation
from steersman.store.models import Answer as StoredAnswer
from steersman.testing.fake_policy import FakePolicy
from steersman.v1 import common_pb2, policy_pb2

SAID = [{"role": "user", "content": "where is my order 2?"}]


def _kept(shop: Shop) -> list[Answer]:
    """The finished answers, as the recorder meets them."""
    found: list[Answer] = []
    finish = shop.gateway.assistant._finish

    async def watch(answer: Answer, *rest: Any) -> None:
        found.append(answer)
        await finish(answer, *rest)

    shop.gateway.assistant._finish = watch  # type: ignore[method-assign]
    return found


def _call_then_say(request: policy_pb2.PolicyServiceChatRequest) -> Any:
    if any(message.role == "tool" for message in request.messages):
        return "Order 2 is processing."
    return [common_pb2.ToolCall(id="1", name="find_order", arguments='{"number": "2"}')]


@pytest.mark.parametrize("mode", ["lookup", "tools"])
async def test_records_never_enter_the_stored_prompt(mode: str) -> None:
    policy = FakePolicy(reply=_call_then_say if mode == "tools" else lambda request: "Order 2 is processing.")
    async with running_shop(policy, tools={"mode": mode}, defaults={"systemPrompt": "Be kind."}) as shop:
        finished = _kept(shop)
        body = await shop.ask(SAID[0]["content"], conversation_id="talk-1", temperature=0.5, seed=7)
        with shop.gateway.store.reading() as session:
            stored = session.scalars(sa.select(StoredAnswer)).one()
            turns = session.scalars(sa.select(Conversation.turns)).one()
        seen = "".join(message.content for message in shop.policy.requests[-1].messages)
    assert "39.80" in seen
    assert stored.prompt == [{"role": "system", "content": "Be kind."}, *SAID]
    assert turns == [*SAID, {"role": "assistant", "content": "Order 2 is processing."}]
    (answer,) = finished
    evidence = answer.evidence("champion")
    assert body["steersman"]["sources"] == [{"system": "erp", "record": "order/2"}]
    (lookup,) = evidence.lookups
    assert (lookup.tool, dict(lookup.arguments), lookup.outcome) == (
        "find_order" if mode == "tools" else "order",
        {"number": "2"},
        "found",
    )
    assert "39.80" in lookup.text
    assert "39.80" not in repr(lookup)
    assert "39.80" not in repr(lookup.as_json())
    assert evidence.sampling == {"max_new_tokens": 4000, "temperature": 0.5, "top_p": 1.0, "seed": "7"}
    assert (evidence.variant, evidence.adapter, evidence.weights_version) == ("champion", "fake", 1)
    ids = np.frombuffer(evidence.token_ids[0], "<u4")
    assert len(ids) == len(np.frombuffer(evidence.logprobs[0], "<f4")) == len(["Order", "2", "is", "processing."])


async def test_what_is_remembered_fits_the_limits() -> None:
    limits = {"messageChars": 1000, "messages": 5}
    policy = FakePolicy(reply=lambda request: "x" * 300)
    async with running_shop(policy, limits=limits, tools={"systems": []}) as shop:
        for _ in range(6):
            await shop.ask("y" * 400, conversation_id="talk-1")
        said = [[len(m.content) for m in request.messages] for request in policy.requests]
    assert all(sum(lengths) <= 1000 and len(lengths) <= 5 for lengths in said)
    assert said[-1] == [300, 400]
