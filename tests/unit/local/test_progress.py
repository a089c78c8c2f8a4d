"""Progress lines, JSON events, the heartbeat and the metrics file."""

from __future__ import annotations

import io
import json
import math
import threading
from pathlib import Path

import pytest

from steersman import progress
from steersman.errors import StorageError
from steersman.progress import ConsoleReporter, clock, drop_rows_from


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEERSMAN_PROGRESS", raising=False)


def test_a_line_shows_stage_step_metrics_and_time_left(tmp_path: Path) -> None:
    out = io.StringIO()
    with ConsoleReporter("rl", tmp_path / "metrics.jsonl", stream=out) as reporter:
        reporter.step(5, 10, reward=0.4242, kl=0.0131, tokens_per_s=312.4, grad_norm=1.0)
    line = out.getvalue()
    assert line.startswith("rl  [#####-----] step 5/10  reward 0.424  kl 0.0131  312 tok/s  left ")
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 5, "total": 10, "reward": 0.4242, "kl": 0.0131, "tokens_per_s": 312.4, "grad_norm": 1.0}
    ]


def test_loading_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that loads for five minutes does not make thirty steps of a second last for hours."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for begin in ("note", "activity"):
        out = io.StringIO()
        with ConsoleReporter("rl", stream=out) as reporter:
            now[0] += 300.0
            getattr(reporter, begin)("working on step 1 of 30")
            now[0] += 1.0
            reporter.step(1, 30, loss=1.0)
            reporter.note("the next one is slower")
            now[0] += 3.0
            reporter.step(2, 30, loss=1.0)
        assert "step 1/30  loss 1  left 0:29" in out.getvalue()
        assert "step 2/30  loss 1  left 0:56" in out.getvalue()


def test_json_events_are_one_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSMAN_PROGRESS", "json")
    out = io.StringIO()
    with ConsoleReporter("rl", stream=out) as reporter:
        reporter.note("loading")
        reporter.step(1, 2, reward=math.nan)
    note, step = [json.loads(line) for line in out.getvalue().splitlines()]
    assert note == {"event": "note", "stage": "rl", "text": "loading"}
    assert step.pop("seconds_left") >= 0
    assert step == {"event": "progress", "stage": "rl", "step": 1, "total": 2, "reward": None}


def test_a_continued_run_replaces_the_rows_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "rl" / "metrics.jsonl"
    with ConsoleReporter("rl", path, stream=io.StringIO()) as reporter:
        for step in (1, 2, 3):
            reporter.step(step, 4, loss=float(step))
    with path.open("a") as file:
        file.write('{"step": 4, "tot')  # killed while writing
    with ConsoleReporter("rl", path, stream=io.StringIO()) as reporter:
        for step in (3, 4):
            reporter.step(step, 4, loss=10.0 + step)
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]


def test_training_and_validation_of_one_step_are_two_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with ConsoleReporter("sft", path, stream=io.StringIO()) as reporter:
        reporter.step(1, 1, loss=2.0)
        reporter.step(1, 1, eval_loss=3.0)
    assert rows(path) == [{"step": 1, "total": 1, "loss": 2.0}, {"step": 1, "total": 1, "eval_loss": 3.0}]


def test_a_torn_line_alone_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    drop_rows_from(path, 2)
    assert path.read_text() == '{"step": 1}\n'


def test_silence_is_filled_with_what_is_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress._Lines, "quiet_seconds", 0.0)
    out = _Signal("... generating 31/48")
    with ConsoleReporter("rl", stream=out) as reporter:
        reporter.activity("generating 31/48")
        assert out.seen.wait(30)
    assert "rl  ... generating 31/48 (" in out.getvalue()


def test_a_full_disk_is_one_sentence() -> None:
    reporter = ConsoleReporter("rl", Path("/dev/full"), stream=io.StringIO())
    reporter._continued = True  # /dev/full cannot be read back
    with pytest.raises(StorageError, match="disk full while saving /dev/full"):
        reporter.step(1, 2, loss=1.0)


def test_clock() -> None:
    assert [clock(9), clock(221), clock(3 * 3600 + 61)] == ["0:09", "3:41", "3:01:01"]


class _Signal(io.StringIO):
    """Says when a text has been written."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen = threading.Event()
        self._text = text

    def write(self, text: str) -> int:
        if self._text in text:
            self.seen.set()
        return super().write(text)


def test_a_part_that_counts_its_steps_anew_does_not_remove_the_stages_rows(tmp_path: Path) -> None:
    path, part = tmp_path / "metrics.jsonl", tmp_path / "round-1" / "metrics.jsonl"
    for first in (1, 2):  # the second time it continues at round 2
        with ConsoleReporter("rejection", path, stream=io.StringIO()) as reporter:
            for number in (1, 2)[first - 1 :]:
                reporter.step(number, 2, reward=float(number))
                with reporter.rows_in(part):
                    reporter.step(1, 1, loss=float(number))
    assert [row["step"] for row in rows(path)] == [1, 2]
    assert [row["loss"] for row in rows(part)] == [2.0]
