"""Which items are worth a person's time first: those on which the reward model is least sure.

The pre-judgement is shown to nobody; it decides nothing but the order (`Item.place`): of two or more answers those
whose best two rewards lie closest come first (uncertainty sampling, Lewis and Gale 1994), of single answers the worst.
A model that does not share people's preferences is unsure of the wrong items: it needs a licence from what they have
judged already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import grpc
import sqlalchemy as sa

from steersman.data.records import Message
from steersman.errors import from_grpc
from steersman.judges.licence import enforce, measure, missing
from steersman.judges.options import Licence
from steersman.report.schema import LicenceResult
from steersman.rpc.client import open_channel
from steersman.rpc.conversation import to_message
from steersman.rpc.wire import in_parts
from steersman.store import Store
from steersman.store.blind import rankings_of
from steersman.store.judging import get_project
from steersman.store.models import Item, Project
from steersman.v1 import reward_pb2, reward_pb2_grpc

_CHUNK = 64
_TIMEOUT_SECONDS = 600.0


def place_of(rewards: Sequence[float]) -> float:
    """The place of an item by the rewards of its answers; lower comes first."""
    ordered = sorted(rewards, reverse=True)
    return ordered[0] - ordered[1] if len(ordered) > 1 else ordered[0]


class Ordered(NamedTuple):
    ordered: int
    left: int
    """Items that stay as they are, because an answer has no reward."""
    licence: LicenceResult


def order_by_reward(
    store: Store, project_name: str, target: str, licence: Licence, note: Callable[[str], None]
) -> Ordered:
    """Orders a project's open items by a reward service.

    Args:
        licence: what the model must show on the project's judged items.
        note: called with a line of warning.

    Raises:
        FailedPreconditionError: it has no licence, and `licence.without` is `refuse`.
        SteersmanError: the service refused or is away; names it.
    """
    with store.reading() as session:
        project = get_project(session, project_name)
        rankings, answers = rankings_of(session, project)
        open_items = sa.select(Item).where(
            Item.project_id == project.id, Item.honeypot.is_(False), Item.open_slots > 0, Item.resolved_at.is_(None)
        )
        items = list(session.scalars(open_items.order_by(Item.id)))
    ordered = 0
    with open_channel(target) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        found = _licence(rankings, answers, stub, target, licence)
        enforce({target: found}, licence, note, "order labelling work")
        for start in range(0, len(items), _CHUNK):
            ordered += _order(store, project, items[start : start + _CHUNK], stub, target)
    return Ordered(ordered, len(items) - ordered, found)


def _order(store: Store, project: Project, items: Sequence[Item], stub: Any, target: str) -> int:
    asked = [(item, candidate) for item in items for candidate in item.candidates]
    found = _rewards(stub, target, [[*item.prompt, *candidate["messages"]] for item, candidate in asked])
    rewards: dict[int, list[float | None]] = {}
    for (item, _), reward in zip(asked, found, strict=True):
        rewards.setdefault(item.id, []).append(reward)
    places = {
        item_id: place_of([reward for reward in some if reward is not None])
        for item_id, some in rewards.items()
        if None not in some
    }
    with store.transaction() as session:
        for item_id, place in sorted(places.items()):
            session.execute(sa.update(Item).where(Item.id == item_id).values(place=place))
    return len(places)


def _rewards(stub: Any, target: str, conversations: Sequence[Sequence[dict[str, Any]]]) -> list[float | None]:
    """Of each conversation; None where the service gives none."""
    items = [reward_pb2.ScoreItem(messages=_messages(conversation)) for conversation in conversations]
    scores: list[reward_pb2.ItemScore] = []
    try:
        for part in in_parts([item.ByteSize() for item in items]):
            scores += stub.Score(reward_pb2.ScoreRequest(items=items[part]), timeout=_TIMEOUT_SECONDS).scores
    except grpc.RpcError as error:
        raise from_grpc(error, f"reward {target}") from error
    return [score.reward if score.HasField("reward") else None for score in scores]


def _messages(conversation: Sequence[dict[str, Any]]) -> list[Any]:
    return [to_message(Message.model_validate(turn).model_dump(exclude_none=True)) for turn in conversation]


def _licence(
    rankings: Iterable[tuple[int, str, Sequence[Sequence[int]]]],
    answers: dict[tuple[int, int], list[dict[str, Any]]],
    stub: Any,
    target: str,
    licence: Licence,
) -> LicenceResult:
    """Whether the model prefers what the people of the project do, on one pair of answers of each judged item."""
    pairs = {item: pair for item, pair in clearest_pairs(rankings).items() if pair.share > 0.5}
    if len(pairs) < 2:
        return missing(f"people have preferences on {len(pairs)} items of the project; have some judged first")
    asked = [(item, place) for item, pair in pairs.items() for place in (pair.better, pair.worse)]
    rewards: dict[tuple[int, int], float | None] = {}
    for start in range(0, len(asked), _CHUNK):
        some = asked[start : start + _CHUNK]
        rewards |= zip(some, _rewards(stub, target, [answers[key] for key in some]), strict=True)
    verdicts = []
    for item, pair in pairs.items():
        better, worse = rewards[item, pair.better], rewards[item, pair.worse]
        if better is not None and worse is not None:
            verdicts.append(0.5 if better == worse else float(better > worse))
    several = [pair.share for pair in pairs.values() if pair.people > 1]
    return measure(verdicts, licence, sum(several) / len(several) if several else None)


class Pair(NamedTuple):
    """Two answers to an item, by their places."""

    better: int
    worse: int
    share: float
    """Of the people who say so; a tie counts half."""
    people: int


def clearest_pairs(rankings: Iterable[tuple[int, str, Sequence[Sequence[int]]]]) -> dict[int, Pair]:
    """Of every judged item the two answers about which people agree most. Items are the units of the statistics,
    however many answers they have."""
    votes: dict[int, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for item, _, ranking in rankings:
        place = {answer: rank for rank, group in enumerate(ranking) for answer in group}
        for one, other in combinations(sorted(place), 2):
            score = 0.5 if place[one] == place[other] else float(place[one] < place[other])
            votes[item][one, other].append(score)
    found = {}
    for item, by_pair in votes.items():
        (one, other), scores = max(by_pair.items(), key=lambda entry: abs(sum(entry[1]) / len(entry[1]) - 0.5))
        share = sum(scores) / len(scores)
        pair = Pair(one, other, share, len(scores))
        found[item] = pair if share >= 0.5 else Pair(other, one, 1.0 - share, len(scores))
    return found
