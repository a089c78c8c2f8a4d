"""Champion and candidate behind one gateway: shares, conversations that keep their variant, a candidate that goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import yaml

from services.gateway.backends.split import SplitPool, bucket
from services.gateway.server import Gateway
from services.gateway.testing import gateway_config, running_gateway, until
from steersman.store.models import Answer
from steersman.testing.fake_policy import FakePolicy, serve_policy

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def bot(tmp_path: Path) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient, Any]]:
    """A gateway with two engines, and a function that writes the candidate's share."""
    path = tmp_path / "split.yaml"
    async with serve_policy(FakePolicy()) as champion, serve_policy(FakePolicy()) as candidate:

        def share(percent: float | None) -> None:
            entry = {"candidate": {"name": "c1", "percent": percent, "endpoints": [candidate]}}
            path.write_text(yaml.safe_dump({"champion": {"name": "old"}, **(entry if percent is not None else {})}))

        config = gateway_config(champion, policy={"split": str(path)}, database=f"sqlite:///{tmp_path}/gateway.db")
        async with (
            running_gateway(config) as gateway,
            httpx.AsyncClient(base_url=gateway.url, timeout=30) as http,
        ):
            yield gateway, http, share


async def ask(http: httpx.AsyncClient, text: str, headers: dict[str, str] | None = None, **more: Any) -> str:
    body = {"model": "steersman", "messages": [{"role": "user", "content": text}], "max_tokens": 3, **more}
    answer = await http.post(CHAT, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["steersman"]["variant"]


def reading(gateway: Gateway) -> SplitPool:
    pool = gateway.pool
    assert isinstance(pool, SplitPool)
    return pool


async def test_the_share_of_the_conversations_goes_to_the_candidate_and_is_stored_with_its_name(tmp_path):
    async with bot(tmp_path) as (gateway, http, share):
        assert await ask(http, "before") == "champion"
        share(50)
        await reading(gateway).read()
        seen = {text: await ask(http, text) for text in map(str, range(40))}
        assert {"old", "c1"} == set(seen.values())
        assert seen == {text: "c1" if bucket(f"\n\n{text}") < 50 else "old" for text in seen} or len(set(seen)) == 40
        again = {text: await ask(http, text) for text in list(seen)[:8]}
        assert again == {text: seen[text] for text in again}, "the same conversation, the same variant"
        with gateway.store.reading() as session:
            stored = session.execute(sa.select(Answer.deployment, sa.func.count()).group_by(Answer.deployment)).all()
        assert {name for name, _ in stored} == {"champion", "old", "c1"}
        page = gateway.metrics.render().decode()
        assert 'steersman_gateway_variant_answers_total{outcome="stop",variant="c1"}' in page or (
            'steersman_gateway_variant_answers_total{outcome="length",variant="c1"}' in page
        )


async def test_a_conversation_keeps_its_variant_when_the_share_grows(tmp_path):
    async with bot(tmp_path) as (gateway, http, share):
        share(1)
        await reading(gateway).read()
        names = [f"conversation-{number}" for number in range(12)]
        first = {name: await ask(http, "hello", conversation_id=name) for name in names}
        share(90)
        await reading(gateway).read()
        assert {name: await ask(http, "and then?", conversation_id=name) for name in names} == first
        told = await ask(http, "one more", {"x-steersman-variant": "old"})
        assert told == "old", "a caller that keeps conversations itself sends back who answered"
        share(100)
        await reading(gateway).read()
        assert await ask(http, "all", {"x-steersman-variant": "old"}) == "c1"


@pytest.mark.parametrize("text", [None, "", "candidate: [", "candidate: {name: c1, percent: 500, endpoints: [a:1]}"])
async def test_without_a_file_that_can_be_read_everything_goes_to_the_champion(tmp_path, text):
    async with bot(tmp_path) as (gateway, http, share):
        share(100)
        await reading(gateway).read()
        assert await ask(http, "one") == "c1"
        path = tmp_path / "split.yaml"
        path.unlink() if text is None else path.write_text(text)
        await until(lambda: not reading(gateway).splits)  # it looks by itself
        assert await ask(http, "one") != "c1"


async def test_a_candidate_that_is_not_ready_gets_nothing(tmp_path):
    path = tmp_path / "split.yaml"
    path.write_text(yaml.safe_dump({"candidate": {"name": "c1", "percent": 100, "endpoints": ["127.0.0.1:9"]}}))
    async with serve_policy(FakePolicy()) as champion:
        config = gateway_config(champion, policy={"split": str(path)})
        async with (
            running_gateway(config) as gateway,
            httpx.AsyncClient(base_url=gateway.url, timeout=30) as http,
        ):
            assert await ask(http, "hello") == "champion"


def test_a_share_that_grows_takes_nobody_back():
    keys = [f"key {number}" for number in range(2000)]
    for share in (10, 50):
        assert abs(sum(bucket(key) < share for key in keys) / 20 - share) < 5
    assert {key for key in keys if bucket(key) < 10} <= {key for key in keys if bucket(key) < 50}
