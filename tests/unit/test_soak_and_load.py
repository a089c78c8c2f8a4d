"""What `make soak` and `make bench-load` conclude from what they measure."""

from __future__ import annotations

import os
import time

import numpy as np
import psutil
import pytest

from benchmarks import load_year
from benchmarks.soak import Watch, latency, slope


def test_a_slope_is_within_its_interval_and_a_flat_line_is_no_growth() -> None:
    seconds = np.arange(0, 3600, 10.0)
    noise = np.random.default_rng(0).normal(0, 0.5, len(seconds))
    grows = slope(seconds, 100 + 5 * seconds / 3600 + noise)
    assert grows["low"] < 5 < grows["high"]
    assert grows["low"] > 4
    flat = slope(seconds, 100 + noise)
    assert flat["low"] < 0 < flat["high"]
    # By hand: 1, 2 and 3 an hour apart rise by exactly one an hour.
    exact = slope([0, 3600, 7200], [1, 2, 3])
    assert [exact[name] for name in ("per_hour", "low", "high")] == pytest.approx([1, 1, 1])
    assert slope([0, 3600, 7200], [8, 8, 8]) == {"per_hour": 0, "low": 0, "high": 0}


def test_a_process_that_keeps_opening_files_is_found() -> None:
    held = []
    try:
        with Watch({"this": psutil.Process(os.getpid())}, 0.02) as watch:
            deadline = time.monotonic() + 60
            while len(watch._rows["this"]) < 30 and time.monotonic() < deadline:
                held.append(os.open(os.devnull, os.O_RDONLY))
                time.sleep(0.01)
    finally:
        for handle in held:
            os.close(handle)
    report, bad = watch.found()
    assert report["this"]["handles"]["low"] > 0
    assert any(words.startswith("this: handles grew by at least") for words in bad)


def test_a_process_that_ended_is_said_to_have() -> None:
    watch = Watch({"gone": psutil.Process(os.getpid())}, 1.0)
    assert watch.found()[1] == ["gone: only 0 samples; it ended, or --seconds is too short"]


def test_the_end_is_compared_with_the_beginning_after_the_warm_up() -> None:
    # 100 answers: 25 of warm-up, then 15 of 0.1 s at the beginning and 15 of 0.3 s at the end.
    times = [9.0] * 25 + [0.1] * 15 + [0.2] * 45 + [0.3] * 15
    found = latency(times)
    assert (found["begin_ms_p50"], found["end_ms_p50"]) == pytest.approx((100, 300))
    assert found["end_over_begin"] == pytest.approx(3)


def test_a_small_year_is_measured_whole() -> None:
    report = load_year.run(*load_year.FEWEST)
    assert {"page: operator", "feedback on an answer", "release: feedback", "erasure of a person"} <= set(
        report["operations"]
    )
    assert all(one["seconds"] > 0 for one in report["operations"].values())


def test_what_grows_faster_than_the_data_is_bad() -> None:
    page = {"growth": 4.0, "counted_seconds": 0.5}
    assert load_year._bad("page: items", page) == ["page: items: 4.0 times as long for four times the data"]
    assert load_year._bad("release: feedback", page) == []
    assert load_year._bad("page: items", page | {"growth": 1.1, "counted_seconds": 3.0}) == ["page: items: takes 3.0 s"]
    assert load_year._bad("page: items", page | {"counted_seconds": 0.01}) == [], "too short to be noticed"
