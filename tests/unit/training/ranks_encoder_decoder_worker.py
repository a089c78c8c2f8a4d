"""One rank of test_ranks_encoder_decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from steersman.config.manifest import Lora, Optimizer
from training.parallel import Ranks
from training.stage import run_stage

CASES = {"ppo": None, "nlpo": Lora(rank=4)}
STEPS = 4


def curves(model: Path, work: Path, ranks: Ranks) -> dict[str, list[dict[str, float]]]:
    """Metrics of the steps, and the sum of all weights behind them."""
    from test_ppo_update import build, make_batch, options_of

    rates = {"optimizer": Optimizer(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0)}
    found = {}
    for algorithm, lora in CASES.items():
        options: dict[str, Any] = {"micro_batch_tokens": 30, "minibatches": 2, **rates, **options_of(algorithm)}
        batches = [make_batch(build(model, work, lora=lora, **options).model, seed=seed) for seed in range(2)]
        trainer = build(model, work, lora=lora, ranks=ranks, **options)
        found[algorithm] = [trainer.update(batches[step % 2], step) for step in range(STEPS)]
        weights = trainer.model.trained_state().values()
        found[algorithm].append({"weights": sum(float(value.double().abs().sum()) for value in weights)})
    return found


def write_curves(t5: Path, run_dir: Path, out: Path) -> None:
    """What one rank does."""
    torch.set_num_threads(1)
    joined = Ranks.join("cpu")
    result = curves(t5, out.parent, joined)
    if joined.is_first:
        out.write_text(json.dumps(result))
    run_stage(run_dir, "sft", [])
