"""Online reinforcement learning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from steersman.config.algorithms import ChosenMethod, MethodOptions, PpoSpec, check_method, options_of
from steersman.config.base import FrozenModel, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from steersman.config.kinds.registry import Place, stage
from steersman.config.kinds.reward_model import RewardModelStage
from steersman.config.kinds.sampling import OnlineStage
from steersman.config.kinds.supervised import Lora, Optimizer


class KlController(FrozenModel):
    """Adaptive KL coefficient as in lm-human-preferences."""

    target: PositiveFloat = 6.0
    """KL a sample, in nats."""
    horizon: Positive = 10_000
    """Samples over which the coefficient adapts."""


class KlLoss(FrozenModel):
    """KL to the reference as a term of the loss (DeepSeekMath, equation 3), beside or instead of that in the reward."""

    coefficient: PositiveFloat = 0.04
    """Weight of the term; set klCoefficient to 0 where it takes the place of the KL in the reward."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of a token's KL (Schulman 2020). The gradient of k1 is 0 in expectation without `correction`."""
    correction: bool = True
    """Multiply by the probability ratio, without which the gradient is not that of the KL."""


class Watch(FrozenModel):
    """Looks at checkpoints with scorers that training never uses: the reward models of `scorers`, and verifiable
    rewards of weight 0. A look asks the same prompts, those of `data.prompts.validation` where there are some."""

    every: Positive = 4
    """Steps between looks; the first is before training, the last after it."""
    prompts: Annotated[int, Field(ge=3)] = 32
    """Prompts of a look."""
    samples_per_prompt: Positive = 1
    """Answers to each."""
    scorers: dict[str, str] = {}
    """Reward models by name: folders, relative to the manifest. They reward nothing."""
    false_alarms: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Chance that a training has an alarm in which no such scorer falls while the reward rises, over all looks."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """`warn`, or `stop` training and go on with the next stage."""
    take: Literal["recommended", "last"] = "recommended"
    """The stage's model: the newest checkpoint that no such scorer calls worse than its best one by more than a
    standard error, or the last one."""


@stage("rl")
class RlStage(ChosenMethod, OnlineStage):
    """Online reinforcement learning against the policy, reward and reference services."""

    title = "Online reinforcement learning."
    runner = "training.online.rl_stage:run_rl"
    reads = "prompts"
    trains_policy = uses_services = shared_by_ranks = True

    lora: Lora | None = Lora()
    """None (`null`): full fine-tuning."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-4, schedule="constant", warmup_ratio=0.0)
    """Adam with eps 1e-5."""
    steps: Positive = 24
    """Batches of samples."""
    prompts_per_step: Positive = 12
    """Prompts a batch."""
    samples_per_prompt: Positive = 4
    """Samples of each prompt; the critic-free methods need at least 2."""
    epochs: Positive = 1
    """Passes over a batch."""
    minibatches: Positive = 1
    """Optimizer steps a pass."""
    micro_batch_tokens: Positive | None = None
    """Tokens a forward pass; changes memory and speed, never the result. None: 4096, and for one process on a GPU as
    many as its memory takes, at most 32768."""
    kl_coefficient: NonNegativeFloat = 0.05
    """Weight of the k1 KL to the reference in the per-token reward."""
    adaptive_kl: KlController | None = None
    """Adapts the coefficient; None: fixed."""
    kl_loss: KlLoss | None = None
    """KL to the reference as a term of the loss; None: off."""
    clip: PositiveFloat = 0.2
    """Clipping range of the probability ratio."""
    dual_clip: PositiveFloat | None = None
    """Lower bound of the objective for negative advantages (Ye et al. 2020), above 1; None: off."""
    whiten_advantages: bool = True
    """Zero mean and unit variance over the global batch (PPO and REINFORCE)."""
    score_clip: PositiveFloat | None = 5.0
    """Scores are clipped to this absolute value; None: off."""
    whiten_scores: bool = False
    """Scores get zero mean and unit variance over the batch."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """What the score of a sample that did not end by itself loses, or becomes below 0 (`missingEos`)."""
    missing_eos: Literal["subtract", "replace"] = "subtract"
    """`subtract` the penalty, or `replace` the score by it, negative: a reward only where an answer ends."""
    mismatch_cap: PositiveFloat = 2.0
    """Cap of the truncated importance weight between engine and trainer."""
    stop_kl: PositiveFloat | None = None
    """Ends a batch's update early when the mean KL to the sampling policy passes it; None: off."""
    max_staleness: NonNegative = 0
    """Batches that generation may run ahead; 0: strictly on-policy."""
    gradient_checkpointing: bool = False
    """Trades time for memory."""
    checkpoint_every: Positive = 1
    """Steps between checkpoints; a killed trainer repeats at most these."""
    deterministic: bool = False
    """Bit-equal repetition: deterministic kernels and a fixed composition of scoring batches."""
    watch: Watch | None = None
    """Looks for over-optimisation; None: off."""

    @model_validator(mode="after")
    def _check(self) -> RlStage:
        check_method(self)
        if self.generation.top_p < 1 or self.generation.top_k:
            raise ValueError("generation.topP must be 1 and generation.topK 0: the losses need the whole distribution")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError("dualClip must be above 1")
        if self.lora is not None and self.lora.dropout:
            raise ValueError("lora.dropout must be 0: the trainer's policy would differ from the sampled one")
        if self.minibatches > self.prompts_per_step:
            raise ValueError("minibatches must not exceed promptsPerStep: the samples of a prompt stay together")
        if self.adaptive_kl is not None and not self.kl_coefficient:
            raise ValueError("adaptiveKl multiplies klCoefficient, which is 0; set it above 0")
        if self.stop_kl is not None and self.epochs * self.minibatches == 1:
            raise ValueError("stopKl needs epochs or minibatches above 1: a single update starts at a KL of 0")
        if self.deterministic and self.max_staleness:
            raise ValueError("deterministic needs maxStaleness 0: generation ahead of training is a matter of timing")
        if self.watch is not None and self.max_staleness:
            raise ValueError("watch needs maxStaleness 0: a look asks the policy of one step, with nothing beside it")
        if (
            self.watch is not None
            and not self.watch.scorers
            and self.reward.verifiable
            and all(reward.weight for reward in self.reward.verifiable)
        ):
            raise ValueError(
                "watch needs a scorer that training never uses: add watch.scorers, or a verifiable reward of weight 0"
            )
        return self

    @property
    def options(self) -> MethodOptions:
        """Options of the chosen method."""
        return options_of(self)

    def brings_scorers(self) -> list[str]:
        return super().brings_scorers() + list(self.watch.scorers if self.watch is not None else ())

    def steps_on(self, rows: int) -> int | None:
        return self.steps

    def check_place(self, place: Place) -> None:
        super().check_place(place)
        options = self.options
        if options.draws_from_sets and place.engine != "transformers":
            raise ValueError(
                f"{place.where}.rl.algorithm {self.algorithm} draws from the sets of a mask policy, which only the "
                "engine transformers holds; set services.policy.engine to transformers"
            )
        if not isinstance(options, PpoSpec):
            return
        block = f"{place.where}.rl.{options.name}"
        if options.ptx_coefficient and "demonstrations" not in place.data:
            raise ValueError(f"{block}.ptxCoefficient needs data.demonstrations")
        models = [earlier for earlier in place.earlier if isinstance(earlier, RewardModelStage)]
        if options.critic.kind == "rewardModel" and models and models[0].decide != "sum":
            raise ValueError(
                f"{block}.critic.kind is rewardModel, but reward model {models[0].name} decides by thresholds, which "
                "a linear value head cannot; use kind: valueHead"
            )
        if options.critic.kind == "rewardModel" and not models:
            raise ValueError(
                f"{block}.critic.kind is rewardModel, but no rewardModel stage comes before; use kind: valueHead"
            )
