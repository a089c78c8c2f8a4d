"""The `AlignmentRun` manifest: one document for this machine and for a cluster.

`steersman run -f run.yaml` executes it here; `kubectl apply -f run.yaml` makes the controller
execute the same stages as Jobs. The schema of the CRD is generated from these models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from steersman.config.aspects import AspectThreshold
from steersman.config.base import (
    FrozenModel,
    NonNegative,
    Positive,
    PositiveFloat,
    apply_overrides,
    load_model,
    read_yaml,
)
from steersman.config.kinds import STAGES, Place, StageOptions
from steersman.config.kinds.dpo import DpoStage
from steersman.config.kinds.evaluate import EvaluateStage, KnowledgeTasks
from steersman.config.kinds.ilql import IlqlStage
from steersman.config.kinds.kto import KtoStage
from steersman.config.kinds.rejection_sampling import RejectionSamplingStage
from steersman.config.kinds.release import Canary, Override, ReleaseStage
from steersman.config.kinds.reward_model import RewardModelStage
from steersman.config.kinds.rl import KlController, KlLoss, RlStage, Watch
from steersman.config.kinds.sampling import Generation, OnlineStage, RewardMix, ServedGeneration, VerifiableReward
from steersman.config.kinds.sft import SftStage
from steersman.config.kinds.supervised import Lora, Optimizer, SupervisedStage
from steersman.config.tls import ClientTls
from steersman.errors import ConfigError
from steersman.judges.options import Licence, LlmJudge

__all__ = [
    "API_VERSION", "DATA_KINDS", "KIND", "STAGES", "AlignmentRun", "AspectThreshold", "Canary", "DataSpec",
    "DataSplits", "DemoData", "DpoStage", "EvaluateStage", "Generation", "IlqlStage", "KlController", "KlLoss",
    "KnowledgeTasks", "KtoStage", "Licence", "LlmJudge", "Lora", "Metadata", "ModelSpec", "OnlineStage",
    "Optimizer", "Override", "PolicyServiceSpec", "Precision", "RejectionSamplingStage", "ReleaseStage",
    "Resources", "RewardMix", "RewardModelStage", "RlStage", "RunSpec", "ServedGeneration", "ServiceSpec",
    "ServicesSpec", "SftStage", "Stage", "StageOptions", "SupervisedStage", "Tracking", "Trainer",
    "VerifiableReward", "Watch", "load_manifest",
]  # fmt: skip

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


class _OneKind(FrozenModel):
    """One stage: a mapping with exactly one key."""

    @model_validator(mode="before")
    @classmethod
    def _empty_means_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: {} if value is None and len(data) == 1 else value for key, value in data.items()}
        return data

    @model_validator(mode="after")
    def _exactly_one(self) -> _OneKind:
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
    def spec(self) -> StageOptions:
        options: StageOptions = getattr(self, self.kind)
        return options


if TYPE_CHECKING:

    class Stage(_OneKind):
        pass
else:
    Stage = create_model(
        "Stage",
        __base__=_OneKind,
        __doc__=_OneKind.__doc__,
        **{
            kind: (Annotated[options | None, Field(description=options.title)], None)
            for kind, options in STAGES.items()
        },
    )
"""One field for every kind of `STAGES`."""


DATA_KINDS = tuple(name for name in DataSpec.model_fields if name != "demo")
"""Kinds of data: the fields of `data`."""


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
        stages = [stage.spec for stage in self.stages]
        models = [name for stage in stages if stage.kind == "reward_model" for name in stage.brings_scorers()]
        if len(set(models)) != len(models):
            raise ValueError("two rewardModel stages have the same name; give each its own")
        for index, stage in enumerate(stages):
            place = self._place(stages, index)
            lora: Lora | None = getattr(stage, "lora", None)
            if lora is not None and lora.quantize and self.model.device == "cpu":
                raise ValueError(f"{place.where}.lora.quantize needs a CUDA device, but model.device is cpu; remove it")
            need = stage.needed_data
            if need is not None and need not in place.data:
                raise ValueError(f"{stage.shown(place)} needs data.{need}; add it or use data.demo")
            stage.check_place(place)
            names = models if stage.kind == "reward_model" else [*models, *stage.brings_scorers()]
            double = next((name for name in names if names.count(name) > 1), None)
            if double is not None:
                raise ValueError(f"{place.where}.reward has two scorers named {double}; each needs its own name")
        return self

    def _place(self, stages: Sequence[StageOptions], index: int) -> Place:
        kinds = DATA_KINDS if self.data.demo is not None else ()
        data = {kind for kind in DATA_KINDS if getattr(self.data, kind) is not None} | {*kinds} - {"returns"}
        return Place(
            where=f"stages.{index}",
            earlier=stages[:index],
            later=stages[index + 1 :],
            data=frozenset(data),
            demo=self.data.demo is not None,
            engine=self.services.policy.engine,
            has_reward_service=bool(self.services.reward.endpoints),
            workers=self.trainer.workers,
        )


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

    def stages(self) -> list[tuple[str, StageOptions]]:
        """Name and options of every stage, in order."""
        return [(name, stage.spec) for name, stage in zip(self.stage_names(), self.spec.stages, strict=True)]


def load_manifest(path: Path, overrides: list[str] | None = None) -> AlignmentRun:
    """Reads, overlays and checks a manifest; ConfigError in one sentence otherwise."""
    data = apply_overrides(read_yaml(path), overrides or [])
    if data.get("kind") != KIND or data.get("apiVersion") != API_VERSION:
        raise ConfigError(
            f"{path}: apiVersion must be {API_VERSION} and kind {KIND}, "
            f"not {data.get('apiVersion')!r} and {data.get('kind')!r}"
        )
    return load_model(AlignmentRun, data, str(path))
