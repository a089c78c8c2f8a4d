"""DAPO (Yu et al. 2025, arXiv 2503.14476): GRPO that keeps exploring.

    R_i = score_i - overlong punishment_i - beta sum_t KL_t,   A_i as in GRPO
    L   = sum_i sum_t max(-A_i rho_t, -A_i clip(rho_t, 1 - clip, 1 + clipHigh)) / all tokens

Clip-higher leaves unlikely tokens room to grow; every token weighs the same; prompts whose answers all have one score
teach nothing and are replaced by others (dynamic sampling); answers near the limit lose score bit by bit (equation 13).
"""

from __future__ import annotations

import torch
from torch import Tensor

from steersman.config.algorithms import DapoSpec
from steersman.config.manifest import RlStage
from training.algorithms.grpo import Grpo
from training.algorithms.method import Totals, register
from training.batch import SampleBatch
from training.mathematics import rewards


@register(DapoSpec)
class Dapo(Grpo):
    average = "tokens"

    def __init__(self, stage: RlStage) -> None:
        super().__init__(stage)
        assert isinstance(stage.options, DapoSpec)
        self.dapo = stage.options
        self.clip_high = self.dapo.clip_high
        self.rounds = self.dapo.max_rounds

    def informative(self, batch: SampleBatch) -> Tensor:
        """Those of prompts whose answers differ in score."""
        scores = self.scores(batch)
        found = torch.zeros(len(batch), dtype=torch.bool)
        for group in batch.group.unique().tolist():
            members = batch.group == group
            found |= members & bool(scores[members].min() < scores[members].max())
        return found

    def scores(self, batch: SampleBatch) -> Tensor:
        scores = super().scores(batch)
        shaping = self.dapo.overlong
        if shaping is None:
            return scores
        limit = self.stage.generation.max_new_tokens
        return scores - rewards.overlong_punishment(batch.lengths, limit, shaping.buffer, shaping.penalty)

    def denominator(self, totals: Totals) -> float:
        return totals.tokens
