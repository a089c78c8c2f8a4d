"""The `AlignmentRun` manifest: one document for this machine and for a cluster.

`steersman run -f run.yaml` executes it here; `kubectl apply -f run.yaml` makes the controller
execute the same stages as Jobs. The schema of the CRD is generated from these models.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic.alias_generators import to_camel

from steersman.config.algorithms import ChosenMethod, MethodOptions, PpoSpec, check_method, options_of
from steersman.config.base import (
    FrozenModel,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    apply_overrides,
    load_model,
    read_yaml,
)
from steersman.config.tls import ClientTls
from steersman.errors import ConfigError
from steersman.gates import Gates
from steersman.judges.options import Licence, LlmJudge
from steersman.rewards import check_reward, split_reference

API_VERSION = "steersman.dev/v1alpha1"
KIND = "AlignmentRun"

Precision = Literal["auto", "fp32", "bf16"]


class Metadata(FrozenModel):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,51}[a-z0-9])?$")]
    """Names the run and its folder; a DNS label."""
    namespace: str | None = None
    """Kubernetes namespace; ignored by `steersman run`."""
    labels: dict[str, str] = {}
    """Kubernetes labels."""
    annotations: dict[str, str] = {}
    """Kubernetes annotations."""


class Lora(FrozenModel):
    """Low-rank adaptation (Hu et al. 2021) through PEFT."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """Scale of the update: alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the first factor. Keep 0 for reinforcement learning."""
    target_modules: str | list[str] = "all-linear"
    """PEFT target modules."""
    use_dora: bool = False
    """Weight-decomposed adaptation (DoRA, Liu et al. 2024)."""
    quantize: Literal["nf4"] | None = None
    """QLoRA: the frozen weights in 4 bits (needs a CUDA device and bitsandbytes)."""


class ModelSpec(FrozenModel):
    base: str = "smollm2-135m-instruct"
    """A folder in Hugging Face format, a hub id, or the embedded default `smollm2-135m-instruct`."""
    revision: str | None = None
    """Revision of a hub id."""
    template_options: dict[str, Any] = {}
    """Variables that the chat template gets in training and in every service, for example `{enable_thinking: false}`;
    saved with the models that are trained."""
    precision: Precision = "auto"
    """Arithmetic of the matrix products. `auto` measures which is faster on this hardware."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run."""
    threads: NonNegative = 0
    """CPU threads of each process; 0 means all cores."""

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        taken = _TEMPLATE_INPUTS.intersection(self.template_options)
        if taken:
            raise ValueError(f"templateOptions.{min(taken)} is what the template is given anyway; remove it")
        return self


_TEMPLATE_INPUTS = frozenset(
    ("messages", "conversation", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
     "continue_final_message", "return_dict", "return_tensors", "bos_token", "eos_token")
)  # fmt: skip


class DataSplits(FrozenModel):
    train: str
    """JSONL file, relative to the manifest."""
    validation: str | None = None
    """JSONL file; None: no validation during training."""
    heldout: str | None = None
    """JSONL file that only evaluation reads."""
    test: str | None = None
    """The same as `heldout`, by the name that releases give it."""

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("test") is not None:
            if data.get("heldout") is not None:
                raise ValueError("test and heldout are the same split; give one of them")
            return {name: value for name, value in data.items() if name != "test"} | {"heldout": data["test"]}
        return data


class DemoData(FrozenModel):
    """The synthetic ERP customer-service data that the project brings along."""

    demonstrations: Positive = 420
    """Training demonstrations."""
    preferences: Positive = 320
    """Training preference pairs."""
    prompts: Positive = 400
    """Prompts for reinforcement learning."""
    heldout_prompts: Positive = 96
    """Held-out prompts for evaluation."""


class DataSpec(FrozenModel):
    demo: DemoData | None = None
    """Generate the demo's data instead of reading files."""
    demonstrations: DataSplits | None = None
    """Rows `{"messages": [...]}`."""
    preferences: DataSplits | None = None
    """Rows `{"prompt": [...], "chosen": [...], "rejected": [...]}` with optional `margin`."""
    prompts: DataSplits | None = None
    """Rows `{"prompt": [...]}`."""
    feedback: DataSplits | None = None
    """Rows `{"prompt": [...], "completion": [...], "label": bool}` (thumbs)."""
    aspects: DataSplits | None = None
    """Rows `{"prompt": [...], "completion": [...], "aspects": {...}}`."""
    returns: DataSplits | None = None
    """Rows `{"prompt": [...], "completion": [...], "reward": 1.0}`: what the rest of a conversation was worth."""


class Optimizer(FrozenModel):
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps that warm up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping by global norm."""


class SupervisedStage(FrozenModel):
    """What every stage that TRL trains on rows of a data file has in common."""

    lora: Lora | None = Lora()
    """None (`null`): full fine-tuning."""
    optimizer: Optimizer = Optimizer(learning_rate=2e-4)
    """AdamW."""
    epochs: PositiveFloat = 1.0
    """Passes over the data."""
    max_steps: Positive | None = None
    """Ends earlier."""
    batch_size: Positive = 16
    """Rows an optimizer step."""
    micro_batch_size: Positive = 8
    """Rows a forward pass."""
    max_length: Positive = 1024
    """Longer conversations are refused, never cut silently."""
    gradient_checkpointing: bool = False
    """Trades time for memory."""


class SftStage(SupervisedStage):
    """Supervised fine-tuning through TRL, the loss on assistant tokens only."""

    optimizer: Optimizer = Optimizer(learning_rate=4e-4)
    """AdamW."""


class AspectThreshold(FrozenModel):
    """What an answer must reach before anything else about it counts."""

    aspect: str
    """One of the stage's aspects."""
    limit: Annotated[float, Field(allow_inf_nan=False)]
    """Least rating, in the unit of the ratings; of an aspect with a weight below 0 the largest."""


class RewardModelStage(SupervisedStage):
    """Reward model through TRL with the pairwise ranking loss."""

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


class RlStage(ChosenMethod):
    """Online reinforcement learning against the policy, reward and reference services."""

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
    micro_batch_tokens: Positive = 4096
    """Tokens a forward pass; changes memory and speed, never the result."""
    generation: Generation = Generation()
    """How samples are drawn."""
    reward: RewardMix = RewardMix()
    """What is rewarded."""
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
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of a batch that may lack a reward before the run pauses."""
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


class RejectionSamplingStage(FrozenModel):
    """Best of n by reward, fine-tune on the winners, in rounds (Llama 2, section 3.2.3)."""

    rounds: Positive = 2
    """Rounds of sampling and fine-tuning."""
    prompts_per_round: Positive = 96
    """Prompts a round."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Samples of each prompt."""
    keep_earlier_winners: bool = True
    """Earlier rounds' best answers compete with the new ones (Llama 2's remedy against forgetting)."""
    generation: Generation = Generation()
    """How samples are drawn."""
    reward: RewardMix = RewardMix()
    """What is rewarded."""
    lora: Lora | None = Lora()
    """None (`null`): full fine-tuning."""
    optimizer: Optimizer = Optimizer(learning_rate=2e-4)
    """AdamW."""
    epochs: PositiveFloat = 1.0
    """Passes over a round's winners."""
    batch_size: Positive = 16
    """Conversations an optimizer step."""
    micro_batch_size: Positive = 8
    """Conversations a forward pass."""
    gradient_checkpointing: bool = False
    """Trades time for memory."""
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of a round that may lack a reward before the run pauses."""


class DpoStage(SupervisedStage):
    """Direct preference optimization through TRL (Rafailov et al. 2023) and its variants."""

    loss: Literal["sigmoid", "ipo", "robust", "hinge"] = "sigmoid"
    """TRL's `loss_type`."""
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of flipped labels that `robust` assumes."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-4)
    """AdamW."""

    @model_validator(mode="after")
    def _check(self) -> DpoStage:
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss robust needs the share of wrong labels; set labelSmoothing above 0")
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
            raise ValueError(f"labelSmoothing has no meaning for the loss {self.loss}; remove it")
        return self


class KtoStage(SupervisedStage):
    """Kahneman-Tversky optimization through TRL (Ethayarajh et al. 2024) for thumbs up and down."""

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of the answers with thumbs up."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of the answers with thumbs down."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-4)
    """AdamW."""


class IlqlStage(SupervisedStage):
    """Implicit language Q-learning (Snell et al. 2022; trlX): from what conversations were worth, offline.

    The policy samples from log pi + beta (Q - V), which engine transformers does.
    """

    learn_from: Annotated[
        list[Literal["returns", "preferences", "feedback", "aspects"]], Field(min_length=1, max_length=4)
    ] = ["returns"]
    """Files of `data`; comparisons, thumbs and ratings count as returns from -1 to 1."""
    aspects: dict[str, float] = {}
    """Weights of rated aspects, below 0 where less is better; none given: all 1, but length and complexity 0."""
    beta: NonNegativeFloat = 4.0
    """Weight of Q - V when tokens are drawn; 0: the language model alone."""
    gamma: Probability = 1.0
    """Discount of a token."""
    expectile: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Tau of V's regression: 0.5 is the mean of what was done, towards 1 the best of it."""
    cql: NonNegativeFloat = 0.1
    """Weight of the CQL term, which keeps Q of tokens that nobody said below."""
    lm: NonNegativeFloat = 1.0
    """Weight of the language-model term."""
    lm_beta: NonNegativeFloat = 0.0
    """Tokens count exp(lmBeta (Q - V)) in the language-model term; 0: all the same."""
    polyak: Probability = 0.1
    """Share of the Q heads that goes into their targets after each step."""
    heads_learning_rate: PositiveFloat = 1e-3
    """Of the Q and V heads, which begin at random."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-4)
    """AdamW."""


class KnowledgeTasks(FrozenModel):
    """What must not be forgotten (extra `knowledge`)."""

    folder: str
    """Folder with the authors' files of TruthfulQA, MMLU and GSM8K, relative to the manifest."""
    tasks: Annotated[list[str], Field(min_length=1)] = ["truthfulqa_mc1", "truthfulqa_mc2"]
    """`truthfulqa_mc1`, `truthfulqa_mc2`, `mmlu_SUBJECT`, `gsm8k`."""
    limit: Positive | None = None
    """Only the first questions of each; None: all."""


class EvaluateStage(FrozenModel):
    """Base against SFT against the aligned model on held-out prompts."""

    generation: ServedGeneration = ServedGeneration()
    """How answers are drawn: as they will be served. Temperature 0: the likeliest answer."""
    samples_per_prompt: Positive = 1
    """Answers to each prompt."""
    max_prompts: Positive | None = None
    """Use only the first prompts."""
    checks: list[VerifiableReward] = []
    """Exact scores beside the learned reward; training never sees them. The first one is the report's rubric."""
    scorers: dict[str, str] = {}
    """Further reward models, which training never used, by name: folders, relative to the manifest."""
    suites: list[str] = []
    """Suites that every model is asked: YAML or JSONL files, relative to the manifest."""
    knowledge: KnowledgeTasks | None = None
    """Tasks of lm-evaluation-harness that base and aligned model are asked; None: none."""
    judges: list[LlmJudge] = []
    """Language models that compare every two models' answers."""
    champion: str | None = None
    """Folder of the model that is served now, which answers the same prompts; relative to the manifest."""
    gates: Gates = Gates()
    """What the model must show; a gate that is not passed ends the stage. A bare number is the gate's limit."""

    @model_validator(mode="after")
    def _check(self) -> EvaluateStage:
        if self.generation.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("samplesPerPrompt must be 1 at generation.temperature 0: all answers would be the same")
        names = [judge.name for judge in self.judges]
        if len(set(names)) < len(names):
            raise ValueError("judges: two have the same name; give each its own")
        return self


class Canary(FrozenModel):
    """Limits of a canary. Of candidates as good as the champion at most 5% are ever taken back, and of those worse by
    `maxThumbsDownIncrease` at most 5% promoted, however long it is watched."""

    steps: Annotated[list[Annotated[int, Field(gt=0, le=100)]], Field(min_length=1)] = [10, 50, 100]
    """Percent of the traffic, step by step, rising."""
    minutes_per_step: PositiveFloat = 30.0
    """Time to watch before the next step."""
    min_feedback: NonNegative = 20
    """Judged conversations of the candidate without which no step is left."""
    max_thumbs_down_increase: Annotated[float, Field(gt=0)] = 0.05
    """Promotes only when judgements exclude that the candidate's share of thumbs down exceeds the champion's by so
    much; takes back when they show that it exceeds it at all. 1: judgements are not needed."""
    max_error_rate: NonNegativeFloat = 0.02
    """Takes back when more requests fail, and more than the champion's."""
    max_latency_ratio: PositiveFloat = 1.5
    """Takes back when the median latency exceeds the champion's by this factor."""
    manual_approval: bool = False
    """Wait for the annotation `steersman.dev/approve: "true"` before the first step."""

    @model_validator(mode="after")
    def _steps_leave_something_to_compare(self) -> Canary:
        if any(later <= earlier for earlier, later in itertools.pairwise(self.steps)):
            raise ValueError(f"steps must rise, but they are {self.steps}")
        if self.steps[0] == 100 and self.max_thumbs_down_increase < 1:
            raise ValueError("steps: the first gives all traffic to the candidate, which leaves nothing to compare")
        return self


class Override(FrozenModel):
    """Releases a model in spite of gates that it did not pass; stands in the model card."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]
    """Who decides so."""
    reason: Annotated[str, Field(min_length=1, max_length=2000, pattern=r"\S")]
    """Why."""
    gates: list[str] = []
    """Gates that may fail, as `reward` or `criteria.polite`; empty: all."""

    def covers(self, gate: str) -> bool:
        """Whether a failed gate is let through."""
        return not self.gates or gate in self.gates or gate.partition(".")[0] in self.gates


class ReleaseStage(FrozenModel):
    """Writes the merged model, registers it, and in a cluster releases it step by step."""

    override: Override | None = None
    """None: a gate that is not passed blocks the release."""

    canary: Canary | None = None
    """None: publish at once."""
    inference_service: str | None = None
    """KServe InferenceService that serves the bot."""
    deployment: str | None = None
    """Without KServe: Deployment of the policy service behind our gateway, for example steersman-policy."""

    @model_validator(mode="after")
    def _one_endpoint(self) -> ReleaseStage:
        if self.inference_service is not None and self.deployment is not None:
            raise ValueError("a release has an inferenceService or a deployment, not both")
        return self


class Stage(FrozenModel):
    """One stage: a mapping with exactly one key."""

    sft: SftStage | None = None
    """Supervised fine-tuning."""
    reward_model: RewardModelStage | None = None
    """Reward model."""
    rl: RlStage | None = None
    """Online reinforcement learning."""
    rejection_sampling: RejectionSamplingStage | None = None
    """Best of n and fine-tuning."""
    dpo: DpoStage | None = None
    """Direct preference optimization."""
    kto: KtoStage | None = None
    """Kahneman-Tversky optimization."""
    ilql: IlqlStage | None = None
    """Implicit language Q-learning."""
    evaluate: EvaluateStage | None = None
    """Comparison on held-out prompts."""
    release: ReleaseStage | None = None
    """Publication."""

    @model_validator(mode="before")
    @classmethod
    def _empty_means_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: {} if value is None and len(data) == 1 else value for key, value in data.items()}
        return data

    @model_validator(mode="after")
    def _exactly_one(self) -> Stage:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a stage has exactly one key, not {len(given)}; start a list item for each stage")
        return self

    @model_serializer(mode="wrap")
    def _only_the_key_that_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def kind(self) -> str:
        """Name of the field that is set, for example `reward_model`."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def spec(self) -> FrozenModel:
        stage: FrozenModel = getattr(self, self.kind)
        return stage


class Resources(FrozenModel):
    """Resources of the pods of a part, in Kubernetes notation; ignored by `steersman run`."""

    cpu: str | None = None
    """CPU request."""
    memory: str | None = None
    """Memory request and limit."""
    gpus: NonNegative = 0
    """GPUs of a pod (`nvidia.com/gpu`)."""


class ServiceSpec(FrozenModel):
    endpoints: list[str] = []
    """host:port of running replicas; empty: the run starts its own."""
    replicas: Positive = 1
    """Replicas that the run starts."""
    resources: Resources = Resources()
    """Resources of a replica."""
    tls: ClientTls | None = None
    """How to reach the endpoints by TLS; None: plain text. The controller fills it in where the cluster has TLS."""
    token_env: str | None = None
    """Environment variable with the token that the endpoints ask for; None: none. A run's own services have one."""


class PolicyServiceSpec(ServiceSpec):
    weights_endpoints: list[str] = []
    """host:port of the replicas' control planes (WeightsService), in the order of `endpoints`."""
    weights_folder: str | None = None
    """Folder that the trainer and all replicas see: weights go through it as files, not over gRPC. A relative one lies
    in the run's folder. `steersman run` takes memory (/dev/shm) by itself."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Generation engine."""
    max_context: Positive | None = None
    """Longest prompt plus answer; None: the model's."""
    kv_cache_tokens: Positive = 16_384
    """Tokens that the KV cache holds for all running samples."""


class RewardServiceSpec(ServiceSpec):
    pass


class ReferenceServiceSpec(ServiceSpec):
    pass


class ServicesSpec(FrozenModel):
    policy: PolicyServiceSpec = PolicyServiceSpec()
    """Generation."""
    reward: RewardServiceSpec = RewardServiceSpec()
    """Scoring."""
    reference: ReferenceServiceSpec = ReferenceServiceSpec()
    """Log-probabilities of the frozen reference."""
    start_timeout_seconds: PositiveFloat = 300.0
    """How long to wait until a service answers."""


class Trainer(FrozenModel):
    """The pods that train; ignored by `steersman run` except `workers`."""

    workers: Positive = 1
    """Ranks under torchrun (FSDP2)."""
    resources: Resources = Resources()
    """Resources of a worker."""
    queue: str | None = None
    """Kueue queue (`kueue.x-k8s.io/queue-name`)."""
    backoff_limit: NonNegative = 3
    """Retries of a stage's Job."""


class Tracking(FrozenModel):
    """Where parameters, metrics and artifacts of every stage are sent, through the trackers' own libraries."""

    enabled: bool = True
    """False: nowhere."""
    mlflow: str | None = "embedded"
    """URL of a server; `embedded`: the one of MLFLOW_TRACKING_URI, else a SQLite database beside the run's folder,
    where the library is installed (extra `tracking`); None: not there."""
    experiment: Annotated[str, Field(min_length=1)] = "steersman"
    """MLflow's experiment."""
    tensorboard: bool = False
    """Event files in the run's folder `tensorboard`."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project at Weights & Biases; None: not there."""


class RunSpec(FrozenModel):
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """Everything random derives from it; below 2^32, which is as far as numpy's seeds go."""
    model: ModelSpec = ModelSpec()
    """The base model."""
    data: DataSpec
    """What is learned from."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    """Stages in the order of execution."""
    services: ServicesSpec = ServicesSpec()
    """The services that stages use."""
    trainer: Trainer = Trainer()
    """Where stages run."""
    licence: Licence = Licence()
    """What reward models and LLM judges must show before they reward or gate."""
    tracking: Tracking = Tracking()
    """Where the run's numbers are sent."""
    artifacts: str | None = None
    """fsspec URL of the artifact store; None: the run's folder."""
    from_run: Annotated[str | None, Field(alias="from")] = None
    """Folder of another run, whose complete stages are taken over where this run would make the same: changing the
    last stage does not repeat the ones before it. In a cluster the other run's name."""
    suspend: bool = False
    """Hold the run; only in a cluster."""
    active_deadline_seconds: Positive | None = None
    """Ends the run as failed; only in a cluster."""
    ttl_seconds_after_finished: NonNegative | None = None
    """Deletes a finished run; only in a cluster."""
    ttl_keeps: Literal["all", "released", "nothing"] = "all"
    """What stays of the run's folder when the run is deleted by its time to live: all of it, the released model with
    its card, reports and the manifest, or nothing."""

    @model_validator(mode="after")
    def _stages_have_their_inputs(self) -> RunSpec:
        kinds = [stage.kind for stage in self.stages]
        for index, stage in enumerate(self.stages):
            where = f"stages.{index}"
            need = _DATA_OF_STAGE.get(stage.kind)
            if stage.reward_model is not None and stage.reward_model.objective == "aspects":
                need = "aspects"
            lora: Lora | None = getattr(stage.spec, "lora", None)
            if lora is not None and lora.quantize and self.model.device == "cpu":
                raise ValueError(f"{where}.lora.quantize needs a CUDA device, but model.device is cpu; remove it")
            if need and self.data.demo is None and getattr(self.data, need) is None:
                raise ValueError(f"{where} ({to_camel(stage.kind)}) needs data.{need}; add it or use data.demo")
            if stage.kind in ("rl", "rejection_sampling"):
                reward: RewardMix = stage.spec.reward  # type: ignore[attr-defined]
                if "reward_model" not in kinds[:index] and not reward.verifiable and not self.services.reward.endpoints:
                    raise ValueError(
                        f"{where} ({to_camel(stage.kind)}) has nothing to reward: put a rewardModel stage before it, "
                        "or list reward.verifiable, or give services.reward.endpoints"
                    )
            if (
                stage.rl is not None
                and stage.rl.options.draws_from_sets
                and self.services.policy.engine != "transformers"
            ):
                raise ValueError(
                    f"{where}.rl.algorithm {stage.rl.algorithm} draws from the sets of a mask policy, which only the "
                    "engine transformers holds; set services.policy.engine to transformers"
                )
            if stage.rl is not None and isinstance(options := stage.rl.options, PpoSpec):
                block = f"{where}.rl.{options.name}"
                if options.ptx_coefficient and self.data.demo is None and self.data.demonstrations is None:
                    raise ValueError(f"{block}.ptxCoefficient needs data.demonstrations")
                models = [earlier.reward_model for earlier in self.stages[:index] if earlier.reward_model is not None]
                if options.critic.kind == "rewardModel" and models and models[0].decide != "sum":
                    raise ValueError(
                        f"{block}.critic.kind is rewardModel, but reward model {models[0].name} decides by thresholds, "
                        "which a linear value head cannot; use kind: valueHead"
                    )
                if options.critic.kind == "rewardModel" and "reward_model" not in kinds[:index]:
                    raise ValueError(
                        f"{block}.critic.kind is rewardModel, but no rewardModel stage comes before; "
                        "use kind: valueHead"
                    )
            if stage.ilql is not None:
                self._ilql_has_its_inputs(index, stage.ilql)
        names = [stage.reward_model.name for stage in self.stages if stage.reward_model is not None]
        if len(set(names)) != len(names):
            raise ValueError("two rewardModel stages have the same name; give each its own")
        self._scorers_are_told_apart(names)
        self._batches_fit_the_ranks()
        return self

    def _ilql_has_its_inputs(self, index: int, ilql: IlqlStage) -> None:
        where = f"stages.{index} (ilql)"
        for kind in ilql.learn_from:
            if getattr(self.data, kind) is None and (self.data.demo is None or kind == "returns"):
                mend = "set learnFrom: [preferences]" if self.data.demo is not None else "add it or change learnFrom"
                raise ValueError(f"{where} learns from data.{kind}, which is missing; {mend}")
        if self.services.policy.engine != "transformers":
            raise ValueError(
                f"{where}: its policy samples from log pi + beta (Q - V), which services.policy.engine "
                f"{self.services.policy.engine} cannot; use transformers"
            )
        later = next((stage.kind for stage in self.stages[index + 1 :] if stage.kind in POLICY_STAGES), None)
        if later is not None:
            raise ValueError(
                f"{where} is followed by {to_camel(later)}, which would train the language model without its Q and V "
                "heads; put ilql last of the stages that train the policy"
            )

    def _scorers_are_told_apart(self, models: list[str]) -> None:
        for index, stage in enumerate(self.stages):
            online = stage.rl or stage.rejection_sampling
            names = [*models, *(reward.name for reward in online.reward.verifiable)] if online is not None else []
            names += stage.rl.watch.scorers if stage.rl is not None and stage.rl.watch is not None else []
            names += [*models, *stage.evaluate.scorers] if stage.evaluate is not None else []
            double = next((name for name in names if names.count(name) > 1), None)
            if double is not None:
                raise ValueError(f"stages.{index}.reward has two scorers named {double}; each needs its own name")

    def _batches_fit_the_ranks(self) -> None:
        workers = self.trainer.workers
        for index, stage in enumerate(self.stages):
            where = f"stages.{index} ({to_camel(stage.kind)})"
            if isinstance(stage.spec, SupervisedStage) and stage.spec.batch_size % workers:
                raise ValueError(
                    f"{where} has batchSize {stage.spec.batch_size}, which {workers} trainer.workers cannot share; "
                    "make it a multiple"
                )
            if stage.kto is not None and min(stage.kto.micro_batch_size, stage.kto.batch_size // workers) < 2:
                raise ValueError(
                    f"{where} estimates its KL from mismatched rows of a micro-batch; microBatchSize and the share of "
                    "batchSize of each of the trainer.workers must be at least 2"
                )


POLICY_STAGES = ("sft", "rl", "rejection_sampling", "dpo", "kto", "ilql")
"""Kinds of stages that train the policy."""
_DATA_OF_STAGE = {
    "sft": "demonstrations",
    "reward_model": "preferences",
    "rl": "prompts",
    "rejection_sampling": "prompts",
    "dpo": "preferences",
    "kto": "feedback",
    "evaluate": "prompts",
}


class AlignmentRun(FrozenModel):
    """A run from base model to released chatbot."""

    api_version: Literal["steersman.dev/v1alpha1"]
    """Version of this format."""
    kind: Literal["AlignmentRun"]
    """Kind of the document."""
    metadata: Metadata
    """Name and labels."""
    spec: RunSpec
    """What to do."""

    def stage_names(self) -> list[str]:
        """A unique folder name for every stage, in order: its kind, numbered from the second on."""
        names: list[str] = []
        counts: dict[str, int] = {}
        for stage in self.spec.stages:
            kind = stage.kind.replace("_", "-")
            counts[kind] = counts.get(kind, 0) + 1
            names.append(kind if counts[kind] == 1 else f"{kind}-{counts[kind]}")
        return names


def load_manifest(path: Path, overrides: list[str] | None = None) -> AlignmentRun:
    """Reads, overlays and checks a manifest; ConfigError in one sentence otherwise."""
    data = apply_overrides(read_yaml(path), overrides or [])
    if data.get("kind") != KIND or data.get("apiVersion") != API_VERSION:
        raise ConfigError(
            f"{path}: apiVersion must be {API_VERSION} and kind {KIND}, "
            f"not {data.get('apiVersion')!r} and {data.get('kind')!r}"
        )
    return load_model(AlignmentRun, data, str(path))
