"""What a run's folder holds decides whether a manifest may continue in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_helpers import manifest

from steersman.config.manifest import AlignmentRun
from steersman.config.stages import mark_complete
from steersman.errors import ChecksumError, ConflictError, NotFoundError
from steersman.local import folder
from steersman.local.takeover import take_over


def done(run: AlignmentRun, run_dir: Path, *names: str) -> None:
    """Makes a folder in which these stages are complete."""
    folder.write_manifest(run, run_dir)
    for name in names:
        (run_dir / name / "model").mkdir(parents=True)
        (run_dir / name / "model" / "weights").write_text(name)
        mark_complete(run, name, run_dir)


def test_the_same_manifest_continues(run: AlignmentRun, tmp_path: Path) -> None:
    done(run, tmp_path, "sft", "reward-model")
    assert folder.settle(run, tmp_path, force_restart=False) == []
    assert folder.is_done(run, "sft", tmp_path)
    assert not folder.is_done(run, "rl", tmp_path)


def test_another_configuration_of_a_later_stage_is_no_conflict(run: AlignmentRun, tmp_path: Path) -> None:
    done(run, tmp_path, "sft")
    other = manifest(stages=[{"sft": {}}, {"rewardModel": {}}, {"rl": {"steps": 3}}, {"evaluate": {}}])
    assert folder.settle(other, tmp_path, force_restart=False) == []


def test_another_configuration_of_a_complete_stage_is_refused_and_named(run: AlignmentRun, tmp_path: Path) -> None:
    done(run, tmp_path, "sft", "reward-model")
    other = manifest(stages=[{"sft": {}}, {"rewardModel": {"batchSize": 4}}, {"rl": {}}, {"evaluate": {}}])
    with pytest.raises(ConflictError, match=r"reward-model was made with other content \(.*batchSize was 16, now 4\)"):
        folder.settle(other, tmp_path, force_restart=False)
    assert folder.settle(other, tmp_path, force_restart=True) == ["reward-model"]
    assert (tmp_path / "sft" / "complete.json").is_file()
    assert not (tmp_path / "reward-model").exists()


def test_another_seed_concerns_every_stage_and_the_data(run: AlignmentRun, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    done(run, tmp_path, "sft", "reward-model")
    other = manifest(seed=5)
    with pytest.raises(ConflictError, match=r"sft was made with other content \(spec.seed was 17, now 5\)"):
        folder.settle(other, tmp_path, force_restart=False)
    assert folder.settle(other, tmp_path, force_restart=True) == ["sft", "reward-model"]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", [b"\xf2", b"spec: {", b"kind: Other", None], ids=["bytes", "yaml", "field", "gone"])
def test_a_lost_manifest_keeps_what_is_complete_and_does_what_was_begun_again(
    run: AlignmentRun, tmp_path: Path, damage: bytes | None
) -> None:
    done(run, tmp_path, "sft")
    path = folder.manifest_path(tmp_path)
    path.unlink() if damage is None else path.write_bytes(damage)
    assert folder.settle(run, tmp_path, force_restart=False) == [], "sft says itself what it was made with"
    (tmp_path / "reward-model").mkdir()
    (tmp_path / "reward-model" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConflictError, match=r"reward-model cannot go on \(manifest.yaml.* is lost\).*--force-restart"):
        folder.settle(run, tmp_path, force_restart=False)
    assert folder.settle(run, tmp_path, force_restart=True) == ["reward-model"]
    assert folder.is_done(run, "sft", tmp_path)
    # The run writes it anew and looks again: what other content made is found by its digest.
    other = manifest(seed=5)
    folder.write_manifest(other, tmp_path)
    with pytest.raises(ConflictError, match="sft was made with other content"):
        folder.settle(other, tmp_path, force_restart=False)


def test_a_begun_stage_is_not_continued_with_other_settings(run: AlignmentRun, tmp_path: Path) -> None:
    done(run, tmp_path)
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "metrics.jsonl").write_text('{"step": 1}\n')
    other = manifest(stages=[{"sft": {}}, {"rewardModel": {}}, {"rl": {"klCoefficient": 0.1}}, {"evaluate": {}}])
    with pytest.raises(ConflictError, match=r"klCoefficient was 0\.05, now 0\.1"):
        folder.settle(other, tmp_path, force_restart=False)


def test_changed_data_are_noticed(run: AlignmentRun, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "demonstrations.train.jsonl"
    file.write_text("{}\n")
    done(run, tmp_path, "sft")
    file.write_text('{"other": 1}\n')
    with pytest.raises(ConflictError, match="its settings, data files or a stage before it have changed"):
        folder.settle(run, tmp_path, force_restart=False)


def test_a_changed_artifact_is_noticed(run: AlignmentRun, tmp_path: Path) -> None:
    done(run, tmp_path, "sft")
    (tmp_path / "sft" / "model" / "weights").write_text("other")
    with pytest.raises(ConflictError, match="the content has changed since it was written"):
        folder.is_done(run, "sft", tmp_path)


def test_paths_are_taken_from_the_manifests_folder_and_auto_is_decided_once(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    files = {"train": "rows.jsonl", "heldout": "more/rows.jsonl"}
    run = manifest(data={"demonstrations": files}, stages=[{"sft": {}}], model={"base": "base"})
    resolved = folder.resolve(run, tmp_path / "run", tmp_path)
    assert resolved.spec.model.base == str(tmp_path / "base")
    assert resolved.spec.data.demonstrations is not None
    assert resolved.spec.data.demonstrations.train == str(tmp_path / "rows.jsonl")
    assert resolved.spec.data.demonstrations.validation is None
    assert resolved.spec.model.precision == "auto"

    spec = resolved.spec.model_dump(mode="json", by_alias=True)
    spec["model"] |= {"precision": "bf16", "device": "cpu"}
    folder.write_manifest(folder.with_spec(resolved, spec), tmp_path / "run")
    again = folder.resolve(run, tmp_path / "run", tmp_path)
    assert (again.spec.model.precision, again.spec.model.device) == ("bf16", "cpu")


def test_differences_name_the_field() -> None:
    old, new = {"rl": {"steps": 3, "ppo": None}}, {"rl": {"steps": 4, "ppo": {"gamma": 1.0}}}
    assert folder.differences(old, new, "spec.stages.2") == [
        "spec.stages.2.rl.steps was 3, now 4",
        "spec.stages.2.rl.ppo was not set, now {gamma}",
    ]


def test_stages_of_the_same_content_are_taken_over_from_another_run(run: AlignmentRun, tmp_path: Path) -> None:
    done(run, tmp_path / "ppo", "sft", "reward-model", "rl")
    stages = [{"sft": {}}, {"rewardModel": {"batchSize": 4}}, {"dpo": {}}]
    other = manifest(stages=stages, **{"from": "ppo"})
    here = tmp_path / "dpo"
    folder.write_manifest(other, here)
    assert folder.resolve(other, here, tmp_path).spec.from_run == str(tmp_path / "ppo")
    assert take_over(other, "sft", here) == f"taken over from {tmp_path / 'ppo' / 'sft'}"
    assert folder.is_done(other, "sft", here)
    assert (here / "sft" / "model" / "weights").read_text() == "sft"
    assert take_over(other, "sft", here) is None  # it is here already
    assert "spec.stages.1.rewardModel.batchSize was 16, now 4" in str(take_over(other, "reward-model", here))
    assert "has no complete stage dpo" in str(take_over(other, "dpo", here))
    assert not (here / "reward-model").exists()


def test_what_is_taken_over_must_be_what_the_other_run_left(run: AlignmentRun, tmp_path: Path) -> None:
    done(run, tmp_path / "ppo", "sft")
    (tmp_path / "ppo" / "sft" / "model" / "weights").write_text("another")
    other = manifest(**{"from": "ppo"})
    with pytest.raises(ChecksumError, match="content has changed"):
        take_over(other, "sft", tmp_path / "dpo")
    with pytest.raises(NotFoundError, match="is not a run's folder"):
        take_over(manifest(**{"from": "nowhere"}), "sft", tmp_path / "dpo")
