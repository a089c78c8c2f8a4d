"""Supervised fine-tuning."""

from __future__ import annotations

from steersman.config.kinds.registry import stage
from steersman.config.kinds.supervised import Optimizer, SupervisedStage


@stage("sft")
class SftStage(SupervisedStage):
    """Supervised fine-tuning through TRL, the loss on assistant tokens only."""

    title = "Supervised fine-tuning."
    runner = "training.offline.sft:run_sft"
    reads = "demonstrations"
    trains_policy = shared_by_ranks = True

    optimizer: Optimizer = Optimizer(learning_rate=4e-4)
    """AdamW."""
