"""Prompts that a later stage could not use are found before the first one has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steersman.config.base import load_model
from steersman.config.manifest import AlignmentRun
from steersman.errors import DataError
from steersman.local.lengths import check_prompts_leave_room
from steersman.local.prepare import check_rows_fit_stages
from steersman.nn.tokens import prompt_ids
from steersman.progress import ConsoleReporter
from steersman.testing.models import save_model_folder, tiny_llama, tiny_tokenizer

PROMPT = {"prompt": [{"role": "user", "content": "where is order 2? " * 8}]}
LENGTH = len(prompt_ids(tiny_tokenizer(), PROMPT["prompt"]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("base"), tiny_llama())


def run(folder: Path, rows: list[dict[str, Any]], reward_model: dict[str, Any], **stage: Any) -> AlignmentRun:
    (folder / "prompts.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    manifest = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "test"},
        "spec": {
            "data": {"prompts": {"train": "prompts.jsonl"}, "preferences": {"train": "none.jsonl"}},
            "stages": [{"rewardModel": reward_model}, {"rl": {"generation": {"maxNewTokens": 20}, **stage}}],
        },
    }
    return load_model(AlignmentRun, manifest, "run.yaml")


def test_a_prompt_too_long_for_the_reward_model_is_found_with_the_length_that_helps(base: Path, tmp_path: Path) -> None:
    reporter = ConsoleReporter("prepare")
    made = run(tmp_path, [PROMPT], {"maxLength": LENGTH + 19})
    with pytest.raises(DataError, match=rf"^prompts\.jsonl:2: .* set its maxLength to at least {LENGTH + 20},"):
        check_prompts_leave_room(made, tmp_path, base, reporter)
    check_prompts_leave_room(run(tmp_path, [PROMPT], {"maxLength": LENGTH + 20}), tmp_path, base, reporter)
    # A backbone of its own has a tokenizer of its own.
    check_prompts_leave_room(run(tmp_path, [PROMPT], {"maxLength": 8, "base": "x"}), tmp_path, base, reporter)


def test_a_prompt_too_long_for_the_policy_is_found(base: Path, tmp_path: Path) -> None:
    long = {"prompt": [{"role": "user", "content": "x" * 500}]}
    with pytest.raises(DataError, match=r"^prompts\.jsonl:3: .* and the policy reads 512; shorten the prompt"):
        check_prompts_leave_room(run(tmp_path, [PROMPT, long], {}), tmp_path, base, ConsoleReporter("prepare"))


def test_repeated_ids_are_found(tmp_path: Path) -> None:
    rows = [{"id": "customer-1", **PROMPT}, {"id": "b", **PROMPT}, {"id": "customer-1", **PROMPT}]
    with pytest.raises(DataError, match=r"^prompts\.jsonl:4: id 'customer-1' is that of line 2, too"):
        check_rows_fit_stages(run(tmp_path, rows, {}), tmp_path)
