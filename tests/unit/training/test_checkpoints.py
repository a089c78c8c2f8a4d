"""Checkpoints that turn out to be damaged, state files that were cut short, disks that refuse."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steersman.artifacts import read_json, refusal, verify
from steersman.config.manifest import AlignmentRun
from steersman.config.stages import mark_complete, read_complete, verified
from steersman.errors import ChecksumError, FailedPreconditionError, StorageError
from steersman.local.usage import Usage
from steersman.progress import ConsoleReporter, drop_rows_from
from training.online.checkpoint import KEPT, Checkpoints


def saved(folder: Path, steps: int = 4) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in range(1, steps + 1):
        checkpoints.save(step, {"weights": torch.full((64,), float(step)), "row": {"reward": 1.0}})
    return checkpoints


def flip(path: Path, place: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_the_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-3", "step-4"]
    assert KEPT == 2
    step, state = checkpoints.load(print) or (0, {})
    assert (step, state["weights"][0].item()) == (4, 4.0)
    assert Checkpoints(tmp_path / "none").load(print) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.pt", flip),
        ("state.pt", cut),
        ("state.pt", Path.unlink),
        ("digests.json", cut),
        ("digests.json", Path.unlink),
        ("digests.json", lambda path: path.write_text("[]")),
        ("digests.json", lambda path: path.write_text("{}")),
        ("digests.json", lambda path: path.write_bytes(b"\xff{")),
    ],
)
def test_a_damaged_one_gives_way_to_the_older_and_says_so(tmp_path: Path, name: str, damage: Any) -> None:
    checkpoints = saved(tmp_path)
    if name == "digests.json" and damage is cut:
        damage = lambda path: path.write_bytes(path.read_bytes()[:10])  # noqa: E731
    damage(tmp_path / "step-4" / name)
    notes: list[str] = []
    step, state = checkpoints.load(notes.append) or (0, {})
    assert (step, state["weights"][0].item()) == (3, 3.0)
    (note,) = notes
    assert f"{tmp_path / 'step-4'} is damaged" in note
    assert "looking for an older one" in note
    assert not (tmp_path / "step-4").exists()


def test_when_all_are_damaged_it_is_one_sentence(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    for step in (3, 4):
        flip(tmp_path / f"step-{step}" / "state.pt")
    with pytest.raises(
        FailedPreconditionError, match=r"no checkpoint can be read: .*remove .* to start the stage over"
    ):
        checkpoints.load(print)


def test_a_bad_byte_in_the_metrics_costs_its_line_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "total": 9, "reward": 0.5}).encode() + b"\n" for step in (1, 2, 3, 4)]
    rows[1] = rows[1].replace(b"0.5", b"0\xff5")
    path.write_bytes(b"".join(rows) + b'[1]\n{"step": 5, "to')
    with ConsoleReporter("rl", path) as reporter:
        reporter.step(4, 9, reward=0.25)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["reward"]) for row in found] == [(1, 0.5), (3, 0.5), (4, 0.25)]
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == rows[1] + b"[1]\n"
    assert "2 damaged lines" in capsys.readouterr().out
    assert drop_rows_from(path, 3) == 0


def test_a_stage_that_has_no_step_left_puts_damaged_metrics_aside(tmp_path: Path) -> None:
    """One that was killed after its last step and goes on."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "total": 2}\n{"step": 2, "tot\n{"step": 2, "to')
    with ConsoleReporter("sft", path):
        pass
    assert path.read_bytes() == b'{"step": 1, "total": 2}\n'
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == b'{"step": 2, "tot\n'


@pytest.mark.parametrize("content", [b"", b'{"seconds": {"sft"', b"\xff\xfe", b"[]", b'{"seconds": 3}'])
def test_damaged_usage_begins_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "usage.json").write_bytes(content)
    with Usage(tmp_path / "usage.json") as usage, usage.phase("sft"):
        pass
    assert set(json.loads((tmp_path / "usage.json").read_text())["seconds"]) == {"sft"}


@pytest.mark.parametrize("content", [b"", b'{"for": "x"', b"\xff\xfe", b"[]", b"{}"])
def test_damaged_answers_of_prepare_are_asked_for_again(tmp_path: Path, content: bytes) -> None:
    from steersman.local.executor import _read_prepared

    (tmp_path / "prepared.json").write_bytes(content)
    assert _read_prepared(tmp_path / "prepared.json") is None


def run_of(folder: Path) -> AlignmentRun:
    document = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "r"},
        "spec": {"data": {"demonstrations": {"train": "d.jsonl"}}, "stages": [{"sft": {}}]},
    }
    (folder / "sft" / "model").mkdir(parents=True)
    (folder / "sft" / "model" / "model.safetensors").write_bytes(b"weights")
    return AlignmentRun.model_validate(document)


def test_a_model_is_taken_whole_and_unchanged_only(tmp_path: Path) -> None:
    run, model = run_of(tmp_path), tmp_path / "sft" / "model"
    with pytest.raises(FailedPreconditionError, match="stage sft is not complete"):
        verified(tmp_path, model)
    mark_complete(run, "sft", tmp_path)
    assert verified(tmp_path, model) == model
    flip(model / "model.safetensors", 3)
    with pytest.raises(ChecksumError, match=r"model\.safetensors: the content has changed"):
        verified(tmp_path, model)


def test_a_stage_that_could_not_be_noted_as_complete_is_whole_once_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = run_of(tmp_path), tmp_path / "sft" / "model"

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(StorageError):
        mark_complete(run, "sft", tmp_path)
    monkeypatch.undo()
    mark_complete(run, "sft", tmp_path)
    verify(tmp_path / "sft", read_complete(tmp_path, "sft")["files"])
    assert verified(tmp_path, model) == model


@pytest.mark.parametrize("content", [b"", b'{"digest": "a', b"\xff", b"[]", b'{"digest": "a"}'])
def test_a_damaged_complete_json_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    run_of(tmp_path)
    (tmp_path / "sft" / "complete.json").write_bytes(content)
    with pytest.raises(ChecksumError, match=r"complete\.json is damaged .*; remove .*sft and start"):
        read_complete(tmp_path, "sft")


def test_a_folder_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    """`/sys` takes no files, not even from root."""
    with pytest.raises(OSError) as caught:  # noqa: PT011
        Checkpoints(Path("/sys/kernel/steersman")).save(1, {})
    assert re.match(r"/sys/kernel/\S+ cannot be used \(.*\); give a folder", str(refusal(caught.value)))
    stage = [sys.executable, "-m", "training.stage", "--run-dir", "/sys/kernel", "--stage", "sft"]
    done = subprocess.run(stage, capture_output=True, text=True, check=False)
    assert done.returncode == 2  # there is no manifest
    assert "Traceback" not in done.stderr
    assert refusal(OSError(errno.EMFILE, "Too many open files")) is not None
    assert refusal(FileNotFoundError(errno.ENOENT, "No such file")) is None
    assert read_json(tmp_path / "none.json", "") is None
