"""Aspects become one reward by thresholds: numbers by hand, the order of all answers, one forward pass for seven."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from services.reward.config import RewardConfig
from services.reward.engine import Item, RewardEngine
from steersman.config.base import load_model
from steersman.config.manifest import AspectThreshold
from steersman.errors import ConfigError
from steersman.nn.forward import trunk_of
from steersman.nn.load import load_reward_backbone
from steersman.nn.reward import Aspect, RewardSettings, decided, write_settings
from steersman.testing.models import save_model_folder, tiny_llama_reward, tiny_tokenizer

SAFE, RUDE = AspectThreshold(aspect="safe", limit=4), AspectThreshold(aspect="rude", limit=2)
ASPECTS = {
    "helpful": Aspect(weight=2.0, mean=3.0, std=1.0),
    "safe": Aspect(weight=0.0, mean=4.5, std=0.5),
    "rude": Aspect(weight=-1.0, mean=2.0, std=2.0),
}


def settings(decide: str, *thresholds: AspectThreshold) -> RewardSettings:
    return RewardSettings(objective="aspects", aspects=ASPECTS, decide=decide, thresholds=list(thresholds))  # type: ignore[arg-type]


def value(found: RewardSettings, helpful: float, safe: float, rude: float) -> float:
    return float(decided(found, torch.tensor([helpful, safe, rude], dtype=torch.float32)))


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number))


def test_by_hand() -> None:
    """The weighted sum is (2 (helpful - 3) - (rude - 2)) / (2 * 1 + 1 * 2); what lacks counts in spreads."""
    both = settings("threshold", SAFE, RUDE)
    assert value(both, 5, 4, 2) == pytest.approx(1 + sigmoid(1.0))
    assert value(both, 5, 3.5, 2) == pytest.approx(math.exp(-1.0))
    assert value(both, 5, 3.5, 3) == pytest.approx(math.exp(-1.0 - 0.5))
    first = settings("lexicographic", SAFE, RUDE)
    assert value(first, 5, 4, 2) == pytest.approx(2 + sigmoid(1.0))
    assert value(first, 5, 4, 4) == pytest.approx(1 + math.exp(-1.0))
    assert value(first, 5, 3, 5) == pytest.approx(math.exp(-2.0))
    swapped = settings("lexicographic", RUDE, SAFE)
    assert value(swapped, 5, 3, 2) == pytest.approx(1 + math.exp(-2.0))


@pytest.mark.parametrize("decide", ["threshold", "lexicographic"])
def test_no_virtue_outweighs_a_threshold_that_is_missed(decide: str) -> None:
    """Every pair of answers on a grid: fewer earlier thresholds met is worth less, whatever else is said of them."""
    found = settings(decide, SAFE, RUDE)
    grid = torch.tensor(list(itertools.product([1.0, 3.0, 5.0], [1.0, 3.9, 4.0, 5.0], [1.0, 2.0, 2.1, 5.0])))
    values = decided(found, grid).tolist()

    def level(row: torch.Tensor) -> int:
        safe, polite = bool(row[1] >= 4), bool(row[2] <= 2)
        if decide == "threshold":
            return int(safe and polite)
        return 0 if not safe else 1 if not polite else 2

    levels = [level(row) for row in grid]
    for one, other in itertools.combinations(range(len(grid)), 2):
        if levels[one] != levels[other]:
            assert (values[one] < values[other]) == (levels[one] < levels[other])
    # Within the best level more help is worth more, and within the others coming closer is.
    assert value(found, 5, 4, 2) > value(found, 4, 4, 2)
    assert value(found, 1, 3.9, 2) > value(found, 5, 3.5, 2)
    assert decided(found, grid[7]) == values[7]


def test_seven_aspects_cost_one_forward_pass(tmp_path: Path) -> None:
    names = ["safe", *(f"aspect {number}" for number in range(6))]
    folder = save_model_folder(tmp_path / "model", tiny_llama_reward(num_labels=7), tiny_tokenizer())
    model = RewardSettings(
        name="seven",
        objective="aspects",
        aspects={name: Aspect(weight=1.0, mean=3.0) for name in names},
        decide="lexicographic",
        thresholds=[AspectThreshold(aspect="safe", limit=3)],
    )
    write_settings(folder, model)
    scorer: dict[str, Any] = {"name": "seven", "kind": "model", "path": str(folder)}
    engine = RewardEngine(load_model(RewardConfig, {"precision": "fp32", "threads": 1, "scorers": [scorer]}, "test"))
    engine.load()
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    reward_model = engine.scorers[0]._model  # type: ignore[attr-defined]
    trunk_of(reward_model.members[0]).layers[0].register_forward_pre_hook(count)
    items = [
        Item([{"role": "user", "content": "?"}, {"role": "assistant", "content": text}], [], "", {})
        for text in ("one", "another", "a third")
    ]
    scores = engine.score(items)
    assert passes == 1
    for score in scores:
        rated = dict(score.parts[0].aspects)
        assert set(rated) == set(names)
        wanted = decided(model, torch.tensor([rated[name] for name in names]))
        assert score.reward == pytest.approx(float(wanted), abs=1e-5)
    assert len({round(score.reward, 6) for score in scores}) == 3
    with pytest.raises(ConfigError, match="decides by thresholds, which no value head can"):
        load_reward_backbone(folder)
