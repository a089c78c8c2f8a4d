"""Every offline method of the manifest: what holds it. A new one fails here until all of it is there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml
from pydantic.alias_generators import to_camel

from steersman.config.kinds import STAGES

ROOT = Path(__file__).parents[3]
TRAINING, ALGORITHMS = Path(__file__).parent, Path(__file__).parents[1] / "algorithms"

METHODS = sorted(kind for kind, options in STAGES.items() if options.runner.startswith("training.offline."))

HELD_BY = {
    "sft": {
        "by hand": (TRAINING / "test_sft.py", "test_sft_loss_equals_the_equation"),
        "invariance": (TRAINING / "test_sft.py", "test_padding_and_micro_batches_change_nothing"),
        "known best": (TRAINING / "test_sft.py", "test_learns_to_answer_and_to_stop_and_an_adapter_learns_otherwise"),
        "resuming": (TRAINING / "test_sft.py", "test_a_killed_run_ends_with_the_same_weights"),
    },
    "reward_model": {
        "by hand": (ALGORITHMS / "test_reward_losses.py", "test_pairwise_by_hand"),
        "invariance": (TRAINING / "test_reward_model.py", "test_micro_batches_change_nothing"),
        "known best": (TRAINING / "test_reward_model.py", "test_learns_the_preference"),
        "resuming": (TRAINING / "test_ranks.py", "test_two_ranks_train_the_stages_of_trl_as_one_does"),
    },
    "dpo": {
        "by hand": (TRAINING / "test_dpo_kto.py", "test_dpo_loss_equals_the_equation"),
        "invariance": (TRAINING / "test_dpo_kto.py", "test_micro_batches_change_nothing"),
        "known best": (TRAINING / "test_dpo_kto.py", "test_dpo_reaches_the_optimum_of_its_loss"),
        "resuming": (TRAINING / "test_sft.py", "test_a_killed_run_ends_with_the_same_weights"),  # the same `train`
    },
    "kto": {
        "by hand": (TRAINING / "test_dpo_kto.py", "test_kto_loss_equals_the_equation"),
        "invariance": (TRAINING / "test_dpo_kto.py", "test_kto_padding_changes_nothing"),
        "known best": (TRAINING / "test_dpo_kto.py", "test_kto_follows_the_thumbs"),
        "resuming": (TRAINING / "test_sft.py", "test_a_killed_run_ends_with_the_same_weights"),  # the same `train`
    },
    "ilql": {
        "by hand": (ALGORITHMS / "test_ilql_loss.py", "test_two_actions_by_hand"),
        "invariance": (TRAINING / "test_ilql.py", "test_micro_batches_padding_and_order_change_nothing"),
        "known best": (TRAINING / "test_ilql.py", "test_ilql_puts_trajectories_together"),
        "resuming": (TRAINING / "test_ilql.py", "test_a_killed_stage_goes_on_to_the_same_weights"),
    },
}


@pytest.mark.parametrize("kind", STAGES)
def test_what_runs_a_stage_is_there(kind: str) -> None:
    module, _, function = STAGES[kind].runner.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_offline_method_is_asked() -> None:
    assert set(METHODS) == set(HELD_BY)


@pytest.mark.parametrize("kind", METHODS)
def test_a_method_has_its_equation_example_tests_and_row(kind: str) -> None:
    module = STAGES[kind].runner.partition(":")[0]
    found = importlib.import_module(module)
    assert "L = " in (found.__doc__ or "") or "training.mathematics" in (found.__doc__ or ""), (
        "it does not say its loss"
    )
    documents = [yaml.safe_load(path.read_text()) for path in (ROOT / "examples").glob("*/*.yaml")]
    assert any(to_camel(kind) in stage for document in documents for stage in document["spec"]["stages"])
    rows = (ROOT / "docs/algorithms.md").read_text().splitlines()
    assert any(line.startswith("|") and f"(`{to_camel(kind)}`)" in line for line in rows), "docs/algorithms.md: no row"
    assert set(HELD_BY[kind]) == {"by hand", "invariance", "known best", "resuming"}
    for path, name in HELD_BY[kind].values():
        assert f"def {name}(" in path.read_text(), f"{path.name} has no {name}"
    ranks = (TRAINING / "test_ranks.py").read_text()
    assert f'{{"{to_camel(kind)}": ' in ranks or kind == "kto", "ranks"  # KTO's KL is that of a micro-batch, as in TRL
