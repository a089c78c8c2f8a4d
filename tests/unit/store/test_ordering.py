"""Labelling first what the reward model is least sure of."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from steersman.cli.data import app
from steersman.errors import ConfigError, FailedPreconditionError
from steersman.ordering import Pair, clearest_pairs, place_of
from steersman.store import Store
from steersman.store.handing import next_task
from steersman.store.judging import NewItem, NewJudgement, add_items, create_project, ensure_labeler, record
from steersman.store.models import Item
from steersman.store.verdicts import Verdict
from steersman.v1 import reward_pb2, reward_pb2_grpc


class Rewards(reward_pb2_grpc.RewardServiceServicer):
    """The reward is the number that the answer says; none for "?"."""

    def Score(self, request: Any, context: Any) -> Any:
        said = [item.messages[-1].content for item in request.items]
        scores = [
            reward_pb2.ItemScore(error="?") if text == "?" else reward_pb2.ItemScore(reward=float(text))
            for text in said
        ]
        return reward_pb2.ScoreResponse(scores=scores)


@pytest.fixture
def rewards() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(Rewards(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


def test_places_by_hand() -> None:
    assert place_of([1.0, 4.0, 3.5]) == 0.5
    assert place_of([-2.0]) == -2.0


def test_the_least_sure_comes_first_and_a_failed_reward_changes_nothing(tmp_path: Path, rewards: str) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    store = Store.open(url)
    with store.transaction() as session:
        project = create_project(session, "p", "compare", overlap=1)
        for key, answers in (("sure", "09"), ("unsure", "45"), ("failed", "1?"), ("half", "14")):
            candidates = [{"messages": [{"role": "assistant", "content": text}]} for text in answers]
            add_items(session, project, [NewItem(key, [{"role": "user", "content": key}], candidates)])
    result = CliRunner().invoke(app, ["order", "p", "--reward", rewards, "--store", url])
    assert "has no licence to order labelling work: people have preferences on 0 items" in result.stderr
    assert "3 items of p ordered, 1 left as they are" in result.output
    with store.transaction() as session:
        places = {item.key: item.place for item in session.scalars(sa.select(Item))}
        assert places == pytest.approx({"sure": 9.0, "unsure": 1.0, "failed": 0.0, "half": 3.0})
        handed = []
        for name in ("ann", "bob", "cem", "dan"):
            task = next_task(session, project, ensure_labeler(session, name))
            assert task is not None
            handed.append(task.item.key)
    assert handed == ["failed", "unsure", "half", "sure"]


def test_the_clearest_pair_of_every_item() -> None:
    said = [(1, "ann", [[1], [0]]), (1, "bob", [[0, 1]]), (2, "ann", [[0], [1], [2]]), (2, "bob", [[1], [0], [2]])]
    # Of item 2 both say that answer 2 is the worst; about 0 and 1 they differ.
    assert clearest_pairs(said) == {1: Pair(1, 0, 0.75, 2), 2: Pair(0, 2, 1.0, 2)}


@pytest.mark.parametrize("shares", [True, False])
def test_ordering_needs_a_licence_from_what_people_judged(tmp_path: Path, rewards: str, shares: bool) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    with Store.open(url).transaction() as session:
        project = create_project(session, "p", "compare", overlap=1)
        candidates = [{"messages": [{"role": "assistant", "content": text}]} for text in "28"]
        items = [NewItem(f"k{key}", [{"role": "user", "content": f"q{key}"}], candidates) for key in range(30)]
        add_items(session, project, items)
        ann = ensure_labeler(session, "ann")
        for _ in range(20):
            task = next_task(session, project, ann)
            assert task is not None
            better = int(shares)  # the answer that says 8, or the one that says 2
            verdict = Verdict(ranking=((better,), (1 - better,)))
            record(session, project, NewJudgement(task.item.id, ann.id, verdict, 1.0))
    command = ["order", "p", "--reward", rewards, "--store", url, "--without", "refuse"]
    result = CliRunner().invoke(app, command)
    if shares:
        assert (result.exit_code, "10 items of p ordered" in result.output) == (0, True), result.output
        assert "has a licence: it shares 100.0%" in result.output
    else:
        assert isinstance(result.exception, FailedPreconditionError)
        assert "it shares 0.0%" in str(result.exception)
        with Store.open(url).reading() as session:
            assert set(session.scalars(sa.select(Item.place))) == {0.0}
    assert isinstance(CliRunner().invoke(app, [*command[:-1], "maybe"]).exception, ConfigError)
