"""Which services a stage gets, and with which configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_helpers import manifest

from services.policy.config import PolicyConfig
from services.reference.config import ReferenceConfig
from services.reward.config import RewardConfig
from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun
from steersman.local.services import services_of
from steersman.local.supervisor import Service

BASE = Path("/models/base")
RUN = Path("/runs/r")
CONFIGS = {"policy": PolicyConfig, "reward": RewardConfig, "reference": ReferenceConfig}


def configs(run: AlignmentRun, stage: str) -> dict[str, dict[str, object]]:
    found: list[Service] = services_of(run, stage, RUN, BASE)
    for service in found:
        # The services' own models accept what they are given.
        load_model(CONFIGS[service.name.partition("-")[0]], dict(service.config), service.name)
    return {service.name: dict(service.config) for service in found}


def test_training_stages_need_none(run: AlignmentRun) -> None:
    assert configs(run, "sft") == configs(run, "reward-model") == {}


def test_rl_starts_from_sft_with_policy_reward_and_reference(run: AlignmentRun) -> None:
    found = configs(run, "rl")
    assert list(found) == ["policy-0", "reward-0", "reference-0"]
    assert found["policy-0"]["model"] == found["reference-0"]["model"] == "/runs/r/sft/model"
    assert found["reward-0"]["scorers"] == [
        {"name": "preference", "kind": "model", "path": "/runs/r/reward-model/model", "weight": 1.0}
    ]
    assert found["reference-0"]["mergeRequests"] is True


def test_evaluation_finds_the_services_as_rl_left_them(run: AlignmentRun) -> None:
    assert services_of(run, "rl", RUN, BASE) == services_of(run, "evaluate", RUN, BASE)


def test_without_sft_the_base_model_is_served() -> None:
    reward = {"verifiable": [{"name": "regex", "weight": 0.5, "options": {"pattern": "a"}}]}
    run = manifest(stages=[{"rl": {"algorithm": "rloo", "deterministic": True, "reward": reward}}])
    found = configs(run, "rl")
    assert found["policy-0"]["model"] == "/models/base"
    assert found["reward-0"]["scorers"] == [
        {"name": "regex", "kind": "verifiable", "weight": 0.5, "options": {"pattern": "a"}}
    ]
    assert found["reward-0"]["mergeRequests"] is False


def test_a_second_rl_stage_continues_from_the_first() -> None:
    stages = [{"sft": {}}, {"rewardModel": {}}, {"rl": {}}, {"rl": {"steps": 2}}]
    assert configs(manifest(stages=stages), "rl-2")["policy-0"]["model"] == "/runs/r/rl/model"


def test_given_endpoints_are_used_and_replicas_started() -> None:
    run = manifest(services={"reward": {"endpoints": ["elsewhere:50052"]}, "policy": {"replicas": 2}})
    assert list(configs(run, "rl")) == ["policy-0", "policy-1", "reference-0"]


@pytest.mark.parametrize("stage", ["rl", "evaluate"])
def test_precision_and_threads_are_those_of_the_run(stage: str) -> None:
    run = manifest(model={"precision": "bf16", "threads": 1})
    assert {(c["precision"], c["threads"]) for c in configs(run, stage).values()} == {("bf16", 1)}
