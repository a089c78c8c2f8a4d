"""Kahneman-Tversky optimization."""

from __future__ import annotations

from steersman.config.base import PositiveFloat
from steersman.config.kinds.registry import Place, stage
from steersman.config.kinds.supervised import Optimizer, SupervisedStage


@stage("kto")
class KtoStage(SupervisedStage):
    """Kahneman-Tversky optimization through TRL (Ethayarajh et al. 2024) for thumbs up and down."""

    title = "Kahneman-Tversky optimization."
    runner = "training.offline.kto:run_kto"
    reads = "feedback"
    trains_policy = shared_by_ranks = True

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of the answers with thumbs up."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of the answers with thumbs down."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-4)
    """AdamW."""

    def check_place(self, place: Place) -> None:
        super().check_place(place)
        if min(self.micro_batch_size, self.batch_size // place.workers) < 2:
            raise ValueError(
                f"{self.shown(place)} estimates its KL from mismatched rows of a micro-batch; microBatchSize and the "
                "share of batchSize of each of the trainer.workers must be at least 2"
            )
