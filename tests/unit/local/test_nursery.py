"""Processes that begin by fork of a loaded one are processes as ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from steersman.config.manifest import AlignmentRun
from steersman.local import process
from steersman.local.executor import _loaded
from steersman.local.nursery import Nursery, opened

PROGRAM = """
import json, os, sys, atexit, numpy
atexit.register(print, "ended in order")
print(json.dumps({
    "argv": sys.argv[1:], "name": __name__, "group": os.getpgid(0), "environment": dict(os.environ),
    "loaded": "colorsys" in sys.modules, "draw": numpy.random.rand(),
}), flush=True)
if sys.argv[1:] == ["wait"]:
    import time
    time.sleep(300)
elif sys.argv[1:] == ["fail"]:
    raise ValueError("broken")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "asked_for.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return {**os.environ, "ONLY_HERE": "1"}


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    made = Nursery(["colorsys", "numpy", "there.is.no.such"], tmp_path / "nursery.log")
    yield made
    made.close()


def said(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def wait_for(log: Path, count: int = 1) -> None:
    until = time.monotonic() + 60
    while not (log.is_file() and len(said(log)) == count) and time.monotonic() < until:
        time.sleep(0.02)


def test_each_is_a_process_of_its_own(nursery: Nursery, environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    codes, pids = [], []
    for arguments in (["0"], ["7"], ["fail"]):
        without = {name: value for name, value in environment.items() if name != "HOME"} | {"NUMBER": arguments[0]}
        child = nursery.start("asked_for", arguments, log, without, own_output=True)
        codes.append(child.wait(60))
        pids.append(child.pid)
    assert codes == [0, 7, 1]
    first, second, third = said(log)
    assert [one["group"] for one in (first, second, third)] == pids
    assert [one["environment"]["NUMBER"] for one in (first, second, third)] == ["0", "7", "fail"]
    assert "HOME" not in first["environment"]
    assert first["environment"]["ONLY_HERE"] == "1"
    assert first["name"] == "__main__"
    assert first["loaded"]
    assert len({one["draw"] for one in (first, second, third)}) == 3, "each draws numbers of its own"
    assert "ValueError: broken" in log.read_text()
    assert log.read_text().count("ended in order") == 3
    assert "there.is.no.such" in (tmp_path / "nursery.log").read_text()


def test_it_is_seen_by_its_command_line_and_ends_by_signals(
    nursery: Nursery, environment: dict[str, str], tmp_path: Path
) -> None:
    child = nursery.start("asked_for", ["wait"], tmp_path / "log", environment, own_output=True)
    wait_for(tmp_path / "log")
    assert psutil.Process(child.pid).cmdline()[:4] == [sys.executable, "-m", "asked_for", "wait"]
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    process.stop([child])
    assert child.returncode == -signal.SIGTERM
    assert process.cause(child.returncode) == "killed by signal 15"


def test_an_interrupted_question_costs_no_answer(nursery: Nursery, environment: dict[str, str], tmp_path: Path) -> None:
    child = nursery.start("asked_for", ["3"], tmp_path / "log", environment, own_output=True)
    wait_for(tmp_path / "log")
    until = time.monotonic() + 60
    while psutil.pid_exists(child.pid) and psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)
    nursery._orders.write(b'{"number": -1, "poll": %d}\n' % child.pid)  # asked, and the answer not waited for
    nursery._orders.flush()
    assert child.wait(60) == 3


def test_without_the_nursery_everything_goes_on_by_exec(
    nursery: Nursery, environment: dict[str, str], tmp_path: Path
) -> None:
    lost = nursery.start("asked_for", ["wait"], tmp_path / "log", environment, own_output=True)
    wait_for(tmp_path / "log")
    parent = psutil.Process(lost.pid).parent()
    assert parent is not None
    parent.kill()
    assert lost.wait(60) == -signal.SIGKILL
    child = nursery.start("asked_for", ["0"], tmp_path / "log", environment, own_output=True)
    assert isinstance(child, subprocess.Popen)
    assert child.wait(60) == 0
    assert [one["loaded"] for one in said(tmp_path / "log")] == [True, False]


def test_after_a_library_initialised_cuda_a_process_begins_anew(environment: dict[str, str], tmp_path: Path) -> None:
    """Its copies could not use the GPU: torch says so in each of them."""
    (tmp_path / "asks_the_driver.py").write_text(
        "import sys, types\ncuda = types.SimpleNamespace(_is_in_bad_fork=lambda: True)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
    )
    nursery = Nursery(["colorsys", "asks_the_driver"], tmp_path / "nursery.log")
    try:
        child = nursery.start("asked_for", ["7"], tmp_path / "log", environment, own_output=True)
        assert child.wait(60) == 7
        (found,) = said(tmp_path / "log")
        assert not found["loaded"]
        assert found["environment"]["ONLY_HERE"] == "1"
        assert found["group"] == child.pid
    finally:
        nursery.close()


def test_nothing_outlives_the_run(environment: dict[str, str], tmp_path: Path) -> None:
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom steersman.local.nursery import Nursery\n"
        "nursery = Nursery(['colorsys'], Path(sys.argv[1]) / 'nursery.log')\n"
        "child = nursery.start('asked_for', ['wait'], Path(sys.argv[1]) / 'log', dict(os.environ), own_output=True)\n"
        "print(child.pid, flush=True)\ntime.sleep(300)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        family = psutil.Process(run.pid).children(recursive=True)
        assert pid in {one.pid for one in family}
        assert len(family) == 2
        run.kill()
    _, alive = psutil.wait_procs(family, 60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_on_another_system_everything_begins_by_exec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with opened(["colorsys"], tmp_path / "nursery.log") as start:
        assert start is process.start


def test_only_what_is_still_to_come_is_loaded(run: AlignmentRun, tmp_path: Path) -> None:
    """A run that goes on with reinforcement learning waits for no library of the stages before it."""
    assert {"training.offline.sft", "training.online.rl_stage"} < set(_loaded(run, tmp_path))
    for name in ("sft", "reward-model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "complete.json").touch()
    later = set(_loaded(run, tmp_path))
    assert not {"training.offline.sft", "training.offline.reward_model"} & later
    assert {"training.online.rl_stage", "services.policy.build"} < later
