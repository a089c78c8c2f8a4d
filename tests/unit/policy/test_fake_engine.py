"""The fake engine keeps the promises of the Engine interface."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import numpy as np
import pytest
from engine_client import TIMEOUT, collect, gather, random_prompts, samples

from services.policy.engine import Event, GenerationRequest, RequestFailed, SamplingParams, TokenEvent, WeightsUpdate
from steersman.errors import InvalidArgumentError, UnavailableError
from steersman.testing.fake_engine import FakeEngine


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine(vocab_size=260)
    engine.start()
    yield engine
    engine.close()


def test_it_is_deterministic_and_streams(engine: FakeEngine) -> None:
    request = GenerationRequest(
        "a", random_prompts([3, 9]), SamplingParams(max_new_tokens=30, seed=1), n=2, stream=True
    )
    events, first = collect(engine, request)
    _, again = collect(engine, request)
    assert len(first) == 4
    for place, sample in first.items():
        np.testing.assert_array_equal(sample.token_ids, again[place].token_ids)
        streamed = [
            e.token_id for e in events if isinstance(e, TokenEvent) and (e.prompt_index, e.sample_index) == place
        ]
        assert streamed == sample.token_ids.tolist()


def test_limits_stops_and_constraints(engine: FakeEngine) -> None:
    found = samples(engine, random_prompts([3]), SamplingParams(max_new_tokens=40, min_new_tokens=40))
    assert (len(found[0, 0].token_ids), found[0, 0].finish_reason) == (40, "length")
    request = GenerationRequest(
        "c", random_prompts([3]), SamplingParams(max_new_tokens=9), constraint=lambda *_: np.arange(260) == 77
    )
    assert collect(engine, request)[1][0, 0].token_ids.tolist() == [77] * 9
    with pytest.raises(InvalidArgumentError):
        samples(engine, [np.array([], np.int32)], SamplingParams(max_new_tokens=1))


def test_cancel_and_weights() -> None:
    engine = FakeEngine(vocab_size=260, seconds_per_step=0.005)
    engine.start()
    arrived: queue.Queue[Event] = queue.Queue()
    request = GenerationRequest("a", random_prompts([3]), SamplingParams(max_new_tokens=400, min_new_tokens=400))
    handle = engine.submit(request, arrived.put)
    engine.load_weights(WeightsUpdate(3, "full", {"any": 1}))
    engine.cancel(handle)
    _, found = gather(arrived, request)
    assert found[0, 0].finish_reason == "cancelled"
    assert samples(engine, random_prompts([3]), SamplingParams(max_new_tokens=4))[0, 0].weights_versions == (3,)
    engine.close()


def test_failures_arrive_once() -> None:
    engine = FakeEngine(vocab_size=260, fail_after_tokens=3)
    engine.start()
    arrived: queue.Queue[Event] = queue.Queue()
    request = GenerationRequest("a", random_prompts([3, 4]), SamplingParams(max_new_tokens=9, min_new_tokens=9))
    engine.submit(request, arrived.put)
    assert isinstance(arrived.get(timeout=TIMEOUT), RequestFailed)
    engine.close()
    assert arrived.empty()
    with pytest.raises(UnavailableError):
        engine.submit(request, arrived.put)
