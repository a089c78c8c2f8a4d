"""Candidates from a policy service over real gRPC."""

from __future__ import annotations

import itertools

import grpc
import pytest

from steersman.candidates import Generated, Sampling, generate
from steersman.data.records import Prompt
from steersman.errors import UnavailableError
from steersman.testing.fake_policy import FakePolicy, serve_policy

ROWS = [Prompt.model_validate({"id": str(n), "prompt": [{"role": "user", "content": f"hello {n}"}]}) for n in range(40)]


async def collect(targets: list[str], sampling: Sampling) -> list[Generated]:
    return [found async for found in generate(targets, ROWS, sampling)]


async def test_every_prompt_gets_n_answers_of_every_model_in_order() -> None:
    one, two = FakePolicy(name="one"), FakePolicy(name="two", reply=lambda request: "other", weights_version=7)
    async with serve_policy(one) as first, serve_policy(two) as second:
        found = await collect([first, second], Sampling(n=2, concurrency=8))
    assert [entry.row.id for entry in found] == [row.id for row in ROWS]
    assert one.peak <= 8
    models = [(candidate["model"], candidate["weights_version"]) for candidate in found[3].candidates]
    assert models == [("one", 1), ("one", 1), ("two", 7), ("two", 7)]
    assert found[3].candidates[0]["messages"] == [{"role": "assistant", "content": "You said: hello 3"}]
    assert len({request.sampling.seed for request in one.requests}) == len(ROWS), "each prompt has its own seed"


async def test_empty_and_equal_answers_are_left_out_and_counted() -> None:
    replies = itertools.cycle(["same", ""])
    async with (
        serve_policy(FakePolicy(reply=lambda request: "same")) as one,
        serve_policy(FakePolicy(reply=lambda request: next(replies))) as two,
    ):
        found = await collect([one, two], Sampling(n=1))
    assert {len(entry.candidates) for entry in found} == {1}
    assert {entry.dropped for entry in found} == {1}


async def test_a_busy_service_is_asked_again_and_one_that_is_away_is_named() -> None:
    busy = FakePolicy(capacity=4, seconds_per_token=0.001)
    async with serve_policy(busy) as target:
        found = await collect([target], Sampling(n=1, concurrency=5))
    assert len(found) == len(ROWS)
    async with serve_policy(FakePolicy(fail_with=grpc.StatusCode.UNAVAILABLE)) as target:
        with pytest.raises(UnavailableError, match=f"policy {target}: the fake policy was told to fail"):
            await collect([target], Sampling(n=1))
