"""Generation ahead of training, critics, PPO-ptx and DoRA against real services."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_rl import BANDIT, LIKES_LETTERS, PROMPTS, metrics

from steersman.artifacts import manifest_of_hashes
from steersman.errors import FailedPreconditionError, PermissionDeniedError, StorageError
from steersman.testing.models import save_model_folder, tiny_llama
from training.online.loop import RlLoop

SERVICES = {"mergeRequests": False}


def start(cluster: Any, model: Path, **policy: Any) -> None:
    cluster.start_policy(model, **policy)
    cluster.start_reference(model, merge_requests=False)
    cluster.start_reward(LIKES_LETTERS, **SERVICES)


def hashes(stage: Path) -> dict[str, str]:
    parts = ("adapter/", "model/")
    return {name: digest for name, digest in manifest_of_hashes(stage).items() if name.startswith(parts)}


def test_learns_one_batch_behind(cluster: Any, tiny_model: Path, run_manifest: Callable) -> None:
    start(cluster, tiny_model)
    stage = run_manifest(
        cluster, tiny_model, {"rl": {**BANDIT, "algorithm": "grpo", "maxStaleness": 1}}, prompts=PROMPTS
    )
    rows = metrics(stage)
    assert sum(row["reward"] for row in rows[-5:]) / 5 > 0.9
    assert rows[0]["staleness"] == 0
    assert 0 < sum(row["staleness"] for row in rows) / len(rows) <= 1
    assert all(row["stale"] == 0 for row in rows)
    # Samples of older weights differ from what the trainer would have said; on-policy this is rounding.
    assert max(row["mismatch_mean_abs"] for row in rows) > 1e-3


def test_strictly_on_policy_equals_the_synchronous_loop_bit_for_bit(
    cluster: Any, tiny_model: Path, run_manifest: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`maxStaleness: 0` ends in the same bytes as a loop that does one thing after the other."""

    def one_after_the_other(self: RlLoop) -> None:
        self.publish(0)
        for step in range(self.spec.steps):
            experience = self.collector.collect(step)
            self.update(experience.batch, step)
            self.publish(step + 1)

    start(cluster, tiny_model)
    options = {"rl": {**BANDIT, "algorithm": "grpo", "steps": 4, "lora": {"rank": 4}, "maxStaleness": 0}}
    ahead = hashes(run_manifest(cluster, tiny_model, options, prompts=PROMPTS, name="ahead"))
    monkeypatch.setattr(RlLoop, "run", one_after_the_other)
    synchronous = hashes(run_manifest(cluster, tiny_model, options, prompts=PROMPTS, name="synchronous"))
    assert "adapter/adapter_model.safetensors" in ahead
    assert ahead == synchronous


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_weights_through_a_folder_are_the_same_as_over_grpc(
    lora: dict | None, cluster: Any, tiny_model: Path, run_manifest: Callable, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    start(cluster, tiny_model, artifact_urls=[f"file://{shared}/"])
    options = {"rl": {**BANDIT, "algorithm": "grpo", "steps": 3, "lora": lora}}
    streamed = hashes(run_manifest(cluster, tiny_model, options, prompts=PROMPTS, name="streamed"))
    cluster.weights_folder = shared
    through_files = hashes(run_manifest(cluster, tiny_model, options, prompts=PROMPTS, name="files"))
    assert through_files == streamed
    assert list(shared.iterdir()) == []


def test_a_folder_that_cannot_be_used(cluster: Any, tiny_model: Path, run_manifest: Callable, tmp_path: Path) -> None:
    start(cluster, tiny_model)
    options = {"rl": {**BANDIT, "algorithm": "grpo", "steps": 1}}
    (tmp_path / "file").touch()
    cluster.weights_folder = tmp_path / "file" / "shared"
    with pytest.raises(StorageError, match=r"services\.policy\.weightsFolder: .*Not a directory.*share"):
        run_manifest(cluster, tiny_model, options, prompts=PROMPTS, name="no-folder")
    cluster.weights_folder = tmp_path / "unknown"
    with pytest.raises(PermissionDeniedError, match="under none of the service's artifactUrls"):
        run_manifest(cluster, tiny_model, options, prompts=PROMPTS, name="not-allowed")


def test_a_service_of_another_model_is_refused(
    cluster: Any, tiny_model: Path, run_manifest: Callable, tmp_path: Path
) -> None:
    """The adapter fits, the weights below it are others: the first batch's log-probabilities tell."""
    other = tiny_llama(seed=1)
    other.get_input_embeddings().weight.data *= 20
    cluster.start_policy(save_model_folder(tmp_path / "other", other))
    cluster.start_reference(tiny_model)
    cluster.start_reward(LIKES_LETTERS)
    options = {"rl": {**BANDIT, "algorithm": "rloo", "lora": {"rank": 4}}}
    with pytest.raises(FailedPreconditionError, match=r"differ from the trainer's by \d.*it serves another model"):
        run_manifest(cluster, tiny_model, options, prompts=PROMPTS)
    assert not (tmp_path / "run" / "rl" / "model").exists()


def test_dora_is_served_as_it_is_trained(cluster: Any, tiny_model: Path, run_manifest: Callable) -> None:
    start(cluster, tiny_model)
    options = {**BANDIT, "algorithm": "rloo", "steps": 6, "lora": {"rank": 4, "useDora": True}}
    rows = metrics(run_manifest(cluster, tiny_model, {"rl": options}, prompts=PROMPTS))
    assert max(row["mismatch_mean_abs"] for row in rows) < 1e-4
    assert rows[-1]["kl"] != 0.0


def test_reward_parts_are_reported_apart(cluster: Any, tiny_model: Path, run_manifest: Callable) -> None:
    cluster.start_policy(tiny_model)
    cluster.start_reference(tiny_model)
    digits = {"name": "json-schema", "kind": "verifiable", "weight": 0.0, "options": {"schema": {"type": "integer"}}}
    cluster.start_reward([*LIKES_LETTERS, digits])
    options = {**BANDIT, "algorithm": "reinforce", "steps": 2}
    rows = metrics(run_manifest(cluster, tiny_model, {"rl": options}, prompts=PROMPTS))
    for row in rows:
        assert row["reward_regex"] == row["reward"]
        assert 0 <= row["reward_json-schema"] < 0.5


def test_missing_rewards_are_counted_and_too_many_pause_the_run(
    cluster: Any, tiny_model: Path, run_manifest: Callable
) -> None:
    """`exact-facts` needs facts, which no prompt here has: every answer lacks its reward."""
    cluster.start_policy(tiny_model)
    cluster.start_reference(tiny_model)
    cluster.start_reward([{"name": "exact-facts", "kind": "verifiable"}])
    with pytest.raises(FailedPreconditionError, match=r"32 of 32 samples have no reward .*facts\.needed.*continues"):
        run_manifest(cluster, tiny_model, {"rl": {**BANDIT, "algorithm": "rloo"}}, prompts=PROMPTS)


def test_a_separate_critic_learns_too(cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    """PPO whose critic starts as the reward model, warms up for two steps, and then lets the policy find the letter."""
    from steersman.config.base import dump_yaml, load_model
    from steersman.config.manifest import AlignmentRun
    from steersman.config.stages import mark_complete
    from steersman.testing.models import tiny_llama_reward
    from training.stage import run_stage

    start(cluster, tiny_model)
    save_model_folder(tmp_path / "reward-model" / "model", tiny_llama_reward())
    rows = [{"id": text, "prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    critic = {"kind": "rewardModel", "learningRate": 0.01, "warmupSteps": 2}
    manifest = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "critic"},
        "spec": {
            "seed": 3,
            "model": {"base": str(tiny_model), "precision": "fp32", "device": "cpu", "threads": 1},
            "data": {"prompts": {"train": "prompts.jsonl"}, "preferences": {"train": "prompts.jsonl"}},
            "services": cluster.services(),
            "stages": [{"rewardModel": {}}, {"rl": {**BANDIT, "ppo": {"critic": critic}}}],
        },
    }
    run = load_model(AlignmentRun, manifest, "test")
    (tmp_path / "manifest.yaml").write_text(dump_yaml(run))
    mark_complete(run, "reward-model", tmp_path)
    run_stage(tmp_path, "rl", [])
    learned = metrics(tmp_path / "rl")
    assert learned[1]["kl"] == pytest.approx(0.0, abs=1e-5)  # the policy has not moved yet
    assert learned[-1]["value_error"] < learned[0]["value_error"]
    assert sum(row["reward"] for row in learned[-5:]) / 5 > 0.9
