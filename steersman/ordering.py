"""Which items are worth a person's time first: those on which the reward model is least sure.

The pre-judgement is shown to nobody; it decides nothing but the order (`Item.place`): of two or more answers those
whose best two rewards lie closest come first (uncertainty sampling, Lewis and Gale 1994), of single answers the worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import sqlalchemy as sa

from steersman.data.records import Message
from steersman.errors import from_grpc
from steersman.rpc.client import open_channel
from steersman.rpc.conversation import to_message
from steersman.store import Store
from steersman.store.judging import get_project
from steersman.store.models import Item, Project
from steersman.v1 import reward_pb2, reward_pb2_grpc

_CHUNK = 64
_TIMEOUT_SECONDS = 600.0


def place_of(rewards: Sequence[float]) -> float:
    """The place of an item by the rewards of its answers; lower comes first."""
    ordered = sorted(rewards, reverse=True)
    return ordered[0] - ordered[1] if len(ordered) > 1 else ordered[0]


def order_by_reward(store: Store, project_name: str, target: str) -> tuple[int, int]:
    """Orders a project's open items by a reward service; (ordered, left as they are because an answer has no reward).

    Raises:
        SteersmanError: the service refused or is away; names it.
    """
    with store.reading() as session:
        project = get_project(session, project_name)
        open_items = sa.select(Item).where(
            Item.project_id == project.id, Item.honeypot.is_(False), Item.open_slots > 0, Item.resolved_at.is_(None)
        )
        items = list(session.scalars(open_items.order_by(Item.id)))
    ordered = 0
    with open_channel(target) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        for start in range(0, len(items), _CHUNK):
            ordered += _order(store, project, items[start : start + _CHUNK], stub, target)
    return ordered, len(items) - ordered


def _order(store: Store, project: Project, items: Sequence[Item], stub: Any, target: str) -> int:
    asked = [(item, candidate) for item in items for candidate in item.candidates]
    request = reward_pb2.ScoreRequest(
        items=[reward_pb2.ScoreItem(messages=_conversation(item, candidate)) for item, candidate in asked]
    )
    try:
        scores = stub.Score(request, timeout=_TIMEOUT_SECONDS).scores
    except grpc.RpcError as error:
        raise from_grpc(error, f"reward {target}") from error
    rewards: dict[int, list[float | None]] = {}
    for (item, _), score in zip(asked, scores, strict=True):
        rewards.setdefault(item.id, []).append(score.reward if score.HasField("reward") else None)
    places = {
        item_id: place_of([reward for reward in found if reward is not None])
        for item_id, found in rewards.items()
        if None not in found
    }
    with store.transaction() as session:
        for item_id, place in sorted(places.items()):
            session.execute(sa.update(Item).where(Item.id == item_id).values(place=place))
    return len(places)


def _conversation(item: Item, candidate: dict[str, Any]) -> list[Any]:
    turns = [*item.prompt, *candidate["messages"]]
    return [to_message(Message.model_validate(turn).model_dump(exclude_none=True)) for turn in turns]
