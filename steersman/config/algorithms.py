"""Options of every online method, and what the manifest must know of it.

The method itself is `training/algorithms/NAME.py`. A class in `ONLINE_METHODS` makes the manifest, its JSON schema and
the CRD offer the method: `algorithm: NAME`, and where it has options of its own, a block of that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, create_model, model_validator
from pydantic.alias_generators import to_camel

from steersman.config.base import FrozenModel, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Probability


class Answers(Protocol):
    """How answers are generated."""

    @property
    def max_new_tokens(self) -> int: ...


class Chosen(Protocol):
    """What a method reads of the stage `rl`."""

    @property
    def algorithm(self) -> str: ...
    @property
    def options(self) -> MethodOptions: ...
    @property
    def samples_per_prompt(self) -> int: ...
    @property
    def generation(self) -> Answers: ...
    @property
    def clip(self) -> float: ...
    @property
    def dual_clip(self) -> float | None: ...
    @property
    def max_staleness(self) -> int: ...
    @property
    def kl_loss(self) -> object | None: ...


class MethodOptions(FrozenModel):
    """Options of one method."""

    name: ClassVar[str]
    """What `algorithm` says."""
    least_samples: ClassVar[int] = 1
    """Samples of a prompt that it compares with one another."""
    ratio_of_answer: ClassVar[bool] = False
    """Its probability ratio is that of the whole answer, so that nothing can be clipped token by token."""
    kl_in_loss: ClassVar[bool] = True
    """`klLoss` can be added to its loss."""
    draws_from_sets: ClassVar[bool] = False
    """It draws from the top-p set of a mask policy, which only the engine transformers holds."""

    def check(self, stage: Chosen) -> None:
        """Raises ValueError for options of the stage that this method cannot have."""


class Critic(FrozenModel):
    kind: Literal["rewardModel", "valueHead"] = "rewardModel"
    """A separate model initialised from the reward model, or a head on the policy's trunk."""
    learning_rate: PositiveFloat = 1e-4
    """Of the separate critic, or of the value head."""
    coefficient: PositiveFloat = 0.1
    """Weight of the value loss where policy and critic share the trunk."""
    clip: NonNegativeFloat = 0.2
    """Value clipping range; 0: off."""
    warmup_steps: NonNegative = 0
    """Steps in which only the critic learns."""


class PpoSpec(MethodOptions):
    """What belongs to PPO alone (Schulman et al. 2017; Ziegler et al. 2019)."""

    name = "ppo"

    critic: Critic = Critic()
    """Where values come from."""
    gamma: Probability = 1.0
    """Discount."""
    lam: Probability = 0.95
    """Lambda of the generalized advantage estimation (GAE)."""
    ptx_coefficient: NonNegativeFloat = 0.0
    """PPO-ptx (InstructGPT): weight of the language-model loss on demonstrations; 0: off."""
    whiten_rewards: bool = False
    """Whiten the per-token rewards before GAE."""

    @model_validator(mode="after")
    def _check(self) -> PpoSpec:
        if self.critic.kind == "rewardModel" and self.critic.coefficient != Critic().coefficient:
            raise ValueError("critic.coefficient belongs to kind valueHead; a separate critic has its learningRate")
        return self


class NlpoSpec(PpoSpec):
    """NLPO (Ramamurthy et al. 2023): PPO that draws from the top-p set of an older policy."""

    name = "nlpo"
    draws_from_sets = True

    top_p: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Probability that the mask policy's set of tokens holds."""
    refresh_every: Positive = 20
    """Steps after which the policy as it is then becomes the mask policy."""

    def check(self, stage: Chosen) -> None:
        if stage.max_staleness:
            raise ValueError("nlpo needs maxStaleness 0: a batch must be made with the mask policy that learns from it")


class RlooSpec(MethodOptions):
    """RLOO (Ahmadian et al. 2024)."""

    name = "rloo"
    least_samples = 2
    ratio_of_answer = True


class GrpoSpec(MethodOptions):
    """GRPO (Shao et al. 2024)."""

    name = "grpo"
    least_samples = 2


class DrGrpoSpec(GrpoSpec):
    """Dr. GRPO (Liu et al. 2025)."""

    name = "dr-grpo"


class ReinforceSpec(MethodOptions):
    """REINFORCE (Williams 1992)."""

    name = "reinforce"


class Overlong(FrozenModel):
    """Soft punishment of answers near the token limit (DAPO, equation 13)."""

    buffer: Positive
    """Tokens before `generation.maxNewTokens` over which the punishment grows from 0 to `penalty`."""
    penalty: PositiveFloat = 1.0
    """Taken off the score of an answer that reaches the limit."""


class DapoSpec(MethodOptions):
    """DAPO (Yu et al. 2025): clip-higher, dynamic sampling, token-level loss, overlong reward shaping."""

    name = "dapo"
    least_samples = 2

    clip_high: PositiveFloat = 0.28
    """Upper clipping range of the probability ratio; the lower one is `clip`."""
    max_rounds: Positive = 3
    """Rounds of sampling a step at most, until `promptsPerStep` prompts have answers of different scores."""
    overlong: Overlong | None = None
    """Punishes answers near the token limit; None: off."""

    def check(self, stage: Chosen) -> None:
        if self.overlong is not None and self.overlong.buffer > stage.generation.max_new_tokens:
            raise ValueError("dapo.overlong.buffer must not exceed generation.maxNewTokens")
        if self.clip_high < stage.clip:
            raise ValueError(f"dapo.clipHigh is {self.clip_high}, below clip {stage.clip}; make it at least that")


class GspoSpec(MethodOptions):
    """GSPO (Zheng et al. 2025): the ratio of an answer is the geometric mean of its tokens' ratios."""

    name = "gspo"
    least_samples = 2
    ratio_of_answer = True

    clip_low: PositiveFloat = 3e-4
    """Lower clipping range of that mean; `clip`, which is meant for single tokens, is not used."""
    clip_high: PositiveFloat = 4e-4
    """Upper clipping range."""


class CispoSpec(MethodOptions):
    """CISPO (MiniMax-M1, 2025): clips the importance weight, not the update: every token keeps a gradient."""

    name = "cispo"
    least_samples = 2

    weight_cap: PositiveFloat = 5.0
    """Upper limit of the importance weight."""

    def check(self, stage: Chosen) -> None:
        if stage.dual_clip is not None:
            raise ValueError("dualClip has no meaning for cispo, which clips no update; remove it")


class ReinforcePlusPlusSpec(MethodOptions):
    """REINFORCE++ (Hu 2025): PPO's loss and per-token KL without a critic, advantages whitened over the batch."""

    name = "reinforce-plus-plus"

    group_baseline: bool = False
    """REINFORCE++-baseline: the mean score of a prompt's samples is taken off first."""

    def check(self, stage: Chosen) -> None:
        if self.group_baseline and stage.samples_per_prompt < 2:
            raise ValueError("samplesPerPrompt must be at least 2 for reinforcePlusPlus.groupBaseline")


class OnlineDpoSpec(MethodOptions):
    """Online DPO (Guo et al. 2024): the best and the worst sample of each prompt are a preference."""

    name = "online-dpo"
    least_samples = 2
    ratio_of_answer = True
    kl_in_loss = False

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference; takes the place of `klCoefficient`."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's logistic loss or IPO's squared one."""


ONLINE_METHODS: dict[str, type[MethodOptions]] = {
    options.name: options
    for options in (
        PpoSpec,
        NlpoSpec,
        RlooSpec,
        GrpoSpec,
        DrGrpoSpec,
        ReinforceSpec,
        DapoSpec,
        GspoSpec,
        CispoSpec,
        ReinforcePlusPlusSpec,
        OnlineDpoSpec,
    )
}


def block_of(name: str) -> str:
    """Python name of a method's block of options."""
    return name.replace("-", "_")


def blocks() -> dict[str, type[MethodOptions]]:
    """Methods that have options of their own."""
    return {name: options for name, options in ONLINE_METHODS.items() if options.model_fields}


def _fields() -> dict[str, Any]:
    """`algorithm`, and a block of options for every method that has some."""
    names = Literal[tuple(ONLINE_METHODS)]  # type: ignore[valid-type]
    text = "The method: how advantages are estimated, and what the loss is."
    fields: dict[str, Any] = {"algorithm": (Annotated[names, Field(description=text)], "ppo")}
    for name, options in blocks().items():
        text = f"Options of {name}; refused with every other algorithm."
        fields[block_of(name)] = (Annotated[options | None, Field(description=text)], None)
    return fields


if TYPE_CHECKING:

    class ChosenMethod(FrozenModel):
        algorithm: str = "ppo"
else:
    ChosenMethod = create_model("ChosenMethod", __base__=FrozenModel, **_fields())
"""The fields of the stage `rl` that follow from `ONLINE_METHODS`."""


def options_of(stage: ChosenMethod) -> MethodOptions:
    """Options of the chosen method, its defaults where the manifest gives none."""
    kind = ONLINE_METHODS[stage.algorithm]
    return getattr(stage, block_of(stage.algorithm), None) or kind()


def check_method(stage: Chosen) -> None:
    """Raises ValueError for options that do not belong to the chosen method."""
    chosen = stage.algorithm
    for name in blocks():
        if name != chosen and getattr(stage, block_of(name)) is not None:
            raise ValueError(f"{to_camel(block_of(name))}.* has no meaning for {chosen}; remove it")
    options = stage.options
    if stage.samples_per_prompt < options.least_samples:
        raise ValueError(
            f"samplesPerPrompt must be at least {options.least_samples} for {chosen}: it compares a prompt's samples"
        )
    if stage.dual_clip is not None and options.ratio_of_answer:
        raise ValueError(f"dualClip has no meaning for {chosen}, whose ratio is that of the whole answer; remove it")
    if stage.kl_loss is not None and not options.kl_in_loss:
        raise ValueError(f"klLoss has no meaning for {chosen}, whose loss holds the reference already; remove it")
    options.check(stage)
