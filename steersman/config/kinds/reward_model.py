"""Reward models."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from steersman.config.aspects import AspectThreshold
from steersman.config.base import NonNegativeFloat, Positive
from steersman.config.kinds.registry import stage
from steersman.config.kinds.supervised import Optimizer, SupervisedStage


@stage("reward_model")
class RewardModelStage(SupervisedStage):
    """Reward model through TRL with the pairwise ranking loss."""

    title = "Reward model."
    runner = "training.offline.reward_model:run_reward_model"
    reads = "preferences"
    shared_by_ranks = True

    name: str = "preference"
    """Name of the scorer; several reward models in one run need different names."""
    base: str | None = None
    """Backbone; None: the policy's base model. An encoder (RoBERTa-style) works as well."""
    init_from: Literal["base", "sft"] = "sft"
    """Weights to start from when the backbone is the policy's."""
    objective: Literal["pairwise", "binary", "aspects"] = "pairwise"
    """Pairwise ranking, preferred / not preferred, or regression on several aspects."""
    margin: bool = False
    """Llama 2, equation 2: the rows' `margin` is subtracted from the reward difference."""
    center_rewards: NonNegativeFloat = 0.01
    """Weight of the auxiliary loss that keeps rewards centered (Eisenstein et al. 2023); 0: off."""
    aspects: dict[str, float] = {}
    """Weight of every aspect in the reward; only for the objective `aspects`."""
    decide: Literal["sum", "threshold", "lexicographic"] = "sum"
    """How aspects become one reward: their weighted sum; that sum only where every threshold is met, and the shortfall
    below all of those otherwise; or the first threshold of the list that is missed decides, then the next."""
    thresholds: list[AspectThreshold] = []
    """For `threshold` and `lexicographic`, the most important first."""
    ensemble: Positive = 1
    """Number of models trained with different seeds."""
    ensemble_mode: Literal["mean", "worst"] = "mean"
    """How an ensemble's values become one reward."""
    optimizer: Optimizer = Optimizer(learning_rate=5e-4)
    """AdamW."""

    @model_validator(mode="after")
    def _check(self) -> RewardModelStage:
        if self.margin and self.objective != "pairwise":
            raise ValueError(f"margin belongs to the objective pairwise, not to {self.objective}; remove it")
        if self.aspects and self.objective != "aspects":
            raise ValueError(f"aspects has no meaning for the objective {self.objective}; set objective: aspects")
        if self.objective == "aspects" and not any(self.aspects.values()):
            raise ValueError("aspects is empty or has only zeros; give the weight of every aspect")
        if (self.decide == "sum") != (not self.thresholds):
            raise ValueError(
                f"decide {self.decide} {'has no thresholds; remove them' if self.thresholds else 'needs thresholds'}"
            )
        named = [threshold.aspect for threshold in self.thresholds]
        for name in named:
            if name not in self.aspects:
                raise ValueError(
                    f"thresholds: {name} is none of the aspects; give it a weight, 0 where it adds nothing"
                )
            if named.count(name) > 1:
                raise ValueError(f"thresholds: {name} stands there twice")
        if self.ensemble_mode == "worst" and self.ensemble == 1:
            raise ValueError("ensembleMode worst needs several models; set ensemble to at least 2")
        return self

    @property
    def needed_data(self) -> str:
        return "aspects" if self.objective == "aspects" else "preferences"

    def brings_scorers(self) -> list[str]:
        return [self.name]
