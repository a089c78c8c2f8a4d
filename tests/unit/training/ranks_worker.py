"""One rank of test_ranks: the loss curves of every algorithm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from steersman.config.manifest import Lora, Optimizer
from training.parallel import Ranks

STEPS = 10
CASES: dict[str, tuple[str, Lora | None]] = {
    "ppo-full": ("ppo", None),
    "ppo-lora": ("ppo", Lora(rank=4)),
    "rloo-dora": ("rloo", Lora(rank=4, use_dora=True)),
    "grpo-full": ("grpo", None),
    "dr-grpo-lora": ("dr-grpo", Lora(rank=4)),
    "reinforce-full": ("reinforce", None),
    "dapo-full": ("dapo", None),
    "gspo-full": ("gspo", None),
    "cispo-full": ("cispo", None),
    "reinforce-plus-plus-full": ("reinforce-plus-plus", None),
    "nlpo-full": ("nlpo", None),
    "nlpo-lora": ("nlpo", Lora(rank=4)),
    "online-dpo-lora": ("online-dpo", Lora(rank=4)),
}


def curves(model: Path, work: Path, ranks: Ranks) -> dict[str, list[dict[str, float]]]:
    """Metrics of ten steps on ten frozen batches; the small budget makes more micro-batches than ranks, unevenly."""
    from test_ppo_update import build, make_batch, options_of

    rates = {"optimizer": Optimizer(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0)}
    found = {}
    for name, (algorithm, lora) in CASES.items():
        options: dict[str, Any] = {"micro_batch_tokens": 30, "minibatches": 2, **rates, **options_of(algorithm)}
        batches = [make_batch(build(model, work, lora=lora, **options).model, seed=seed) for seed in range(3)]
        trainer = build(model, work, lora=lora, ranks=ranks, **options)
        found[name] = [trainer.update(batches[step % 3], step) for step in range(STEPS)]
        weights = trainer.model.trained_state()
        found[name].append({"weights": sum(float(value.double().abs().sum()) for value in weights.values())})
    return found


def write_curves(model: Path, out: Path) -> None:
    """What one rank does."""
    torch.set_num_threads(1)
    joined = Ranks.join("cpu")
    result = curves(model, out.parent, joined)
    if joined.is_first:
        out.write_text(json.dumps(result))
