"""How answers are drawn, and what rewards them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from steersman.config.base import FrozenModel, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Probability
from steersman.config.kinds.registry import Place, StageOptions
from steersman.errors import ConfigError
from steersman.rewards import check_reward, split_reference


class VerifiableReward(FrozenModel):
    """A reward that is computed, not learned: a registered one by its name, or a Python function of one's own."""

    name: str = ""
    """Name under which it is reported, and, without `type` and `python`, the one it is registered under. Empty: the
    Python function's."""
    type: str | None = None
    """Name under which the reward is registered, where two of a kind need names of their own."""
    python: str | None = None
    """`module:function` or `path/file.py:function` with the signature of TRL's reward functions; a path starts from the
    manifest's folder."""
    weight: float = 1.0
    """Weight in the sum."""
    options: dict[str, Any] = {}
    """Options of that reward, for example `pattern` of `regex`."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_the_function(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("python"), str) and not data.get("name"):
            return {**data, "name": data["python"].rpartition(":")[2]}
        return data

    @model_validator(mode="after")
    def _check(self) -> VerifiableReward:
        if self.python is not None and self.type is not None:
            raise ValueError("give either type or python")
        try:
            if self.python is not None:
                split_reference(self.python)
            else:
                check_reward(self.type or self.name, self.options)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class RewardMix(FrozenModel):
    model_weight: float = 1.0
    """Weight of the trained reward models."""
    verifiable: list[VerifiableReward] = []
    """Rewards mixed in; each is reported apart."""


class Generation(FrozenModel):
    max_new_tokens: Positive = 48
    """Token limit of an answer."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probabilities have it applied everywhere."""
    top_p: Probability = 1.0
    """Nucleus sampling. The losses need 1."""
    top_k: NonNegative = 0
    """Top-k sampling; 0: off. The losses need 0."""
    stop: list[str] = []
    """Texts of one token each that end an answer, beside the model's own ends; they are part of it."""


class ServedGeneration(Generation):
    """How answers are drawn where nothing is learned from them."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0: the likeliest token every time."""


class OnlineStage(StageOptions):
    """What stages have in common that learn from rewarded samples."""

    generation: Generation = Generation()
    """How samples are drawn."""
    reward: RewardMix = RewardMix()
    """What is rewarded."""
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of a batch that may lack a reward before the run pauses."""

    def brings_scorers(self) -> list[str]:
        return [reward.name for reward in self.reward.verifiable]

    def check_place(self, place: Place) -> None:
        learned = any(stage.kind == "reward_model" for stage in place.earlier)
        if not learned and not self.reward.verifiable and not place.has_reward_service:
            raise ValueError(
                f"{self.shown(place)} has nothing to reward: put a rewardModel stage before it, or list "
                "reward.verifiable, or give services.reward.endpoints"
            )
