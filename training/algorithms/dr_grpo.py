"""Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): GRPO without its two biases.

    A_i = R_i - mean over the answers to a prompt
    L   = sum_i sum_t max(-A_i rho_t, -A_i clip(rho_t)) / (answers * maxNewTokens)

No standard deviation, so that questions that are nearly always or never solved do not weigh more; no mean over an
answer's own length, so that long bad answers do not weigh less.
"""

from __future__ import annotations

from steersman.config.algorithms import DrGrpoSpec
from training.algorithms.grpo import Grpo
from training.algorithms.method import Totals, register


@register(DrGrpoSpec)
class DrGrpo(Grpo):
    scale_by_std = False
    average = "tokens"

    def denominator(self, totals: Totals) -> float:
        return totals.samples * self.stage.generation.max_new_tokens
