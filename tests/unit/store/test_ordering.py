"""Labelling first what the reward model is least sure of."""

from __future__ import annotations

from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from steersman.cli.data import app
from steersman.ordering import place_of
from steersman.store import Store
from steersman.store.judging import NewItem, add_items, create_project, ensure_labeler, next_task
from steersman.store.models import Item
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


def test_places_by_hand() -> None:
    assert place_of([1.0, 4.0, 3.5]) == 0.5
    assert place_of([-2.0]) == -2.0


def test_the_least_sure_comes_first_and_a_failed_reward_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    store = Store.open(url)
    with store.transaction() as session:
        project = create_project(session, "p", "compare", overlap=1)
        for key, answers in (("sure", "09"), ("unsure", "45"), ("failed", "1?"), ("half", "14")):
            candidates = [{"messages": [{"role": "assistant", "content": text}]} for text in answers]
            add_items(session, project, [NewItem(key, [{"role": "user", "content": key}], candidates)])
    server = grpc.server(futures.ThreadPoolExecutor(2))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(Rewards(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    result = CliRunner().invoke(app, ["order", "p", "--reward", f"127.0.0.1:{port}", "--store", url])
    server.stop(0)
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
