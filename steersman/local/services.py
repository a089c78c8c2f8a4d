"""Which services a stage needs, and how they are configured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steersman.config.manifest import AlignmentRun, EvaluateStage, OnlineStage, RewardMix, RlStage, ServicesSpec
from steersman.config.stages import (
    policy_folder,
    reward_model_folders,
    sft_folder,
    stages_before,
    weights_folder,
)
from steersman.local.supervisor import Service, Supervisor
from steersman.rpc.token import RUN_TOKEN

DRAIN_SECONDS = 3.0
"""On one machine nobody else uses the services, so what is still running when they stop is not wanted any more."""
GRPC_NAMES = {
    "policy": "steersman.v1.PolicyService",
    "reward": "steersman.v1.RewardService",
    "reference": "steersman.v1.ReferenceService",
}


def services_of(run: AlignmentRun, name: str, run_dir: Path, base: Path) -> list[Service]:
    """What has to run beside a stage, except what the manifest gives endpoints for.

    Args:
        name: of the stage.
        base: folder of the base model.
    """
    stage = dict(run.stages())[name]
    if not stage.uses_services:
        return []
    # An adapter is published on top of the model that the stage starts from; evaluation publishes whole models.
    newest = sft_folder if isinstance(stage, EvaluateStage) else policy_folder
    model = newest(run, name, run_dir) or base
    found = []
    services = run.spec.services
    if not services.policy.endpoints:
        found += [policy_service(run, model, run_dir, index) for index in range(services.policy.replicas)]
    if not services.reward.endpoints:
        found += _replicas(services, "reward", {**_common(run), "scorers": _scorers(run, name, run_dir)}, run, name)
    if not services.reference.endpoints:
        found += _replicas(services, "reference", {**_common(run), "model": str(model)}, run, name)
    return found


def policy_service(run: AlignmentRun, model: Path, run_dir: Path, index: int) -> Service:
    """A replica of the policy service."""
    spec = run.spec.services.policy
    config = {
        **_common(run),
        "model": str(model),
        "modelName": run.metadata.name,
        "engine": spec.engine,
        "maxContext": spec.max_context,
        "kvCacheTokens": spec.kv_cache_tokens,
    }
    if run.spec.model.template_options:
        config["templateOptions"] = run.spec.model.template_options
    if shared := weights_folder(run, run_dir):
        config["artifactUrls"] = [f"file://{shared}/"]
    return Service(f"policy-{index}", "services.policy", GRPC_NAMES["policy"], config, ("port", "weightsPort"))


def endpoint_overrides(run: AlignmentRun, services: list[Service], supervisor: Supervisor) -> list[str]:
    """`--set` values that tell a stage where its services listen."""
    found: dict[str, list[str]] = {}
    for service in services:
        kind = service.name.rpartition("-")[0]
        found.setdefault(f"{kind}.endpoints", []).append(f"127.0.0.1:{supervisor.port(service.name)}")
        if kind == "policy":
            weights = supervisor.port(service.name, "weightsPort")
            found.setdefault("policy.weightsEndpoints", []).append(f"127.0.0.1:{weights}")
    overrides = [f"spec.services.{key}=[{', '.join(values)}]" for key, values in found.items()]
    overrides += [f"spec.services.{kind}.tokenEnv={RUN_TOKEN}" for kind in GRPC_NAMES if f"{kind}.endpoints" in found]
    shared = run.spec.services.policy.weights_folder
    return [*overrides, f"spec.services.policy.weightsFolder={shared}"] if shared else overrides


def _replicas(
    services: ServicesSpec, kind: str, config: dict[str, Any], run: AlignmentRun, stage_name: str
) -> list[Service]:
    config = {**config, "mergeRequests": not _deterministic(run, stage_name)}
    count = getattr(services, kind).replicas
    return [Service(f"{kind}-{index}", f"services.{kind}", GRPC_NAMES[kind], config) for index in range(count)]


def _common(run: AlignmentRun) -> dict[str, Any]:
    model = run.spec.model
    return {
        "host": "127.0.0.1",
        "drainSeconds": DRAIN_SECONDS,
        "tokenEnv": RUN_TOKEN,
        "precision": model.precision,
        "device": model.device,
        "threads": model.threads,
    }


def _deterministic(run: AlignmentRun, name: str) -> bool:
    """Of the newest online stage up to and with this one, so that evaluation finds the services as they are."""
    stages = [stage for _, stage in stages_before(run, name)] + [dict(run.stages())[name]]
    return next((stage.deterministic for stage in reversed(stages) if isinstance(stage, RlStage)), False)


def _scorers(run: AlignmentRun, name: str, run_dir: Path) -> list[dict[str, Any]]:
    """The reward models so far and the verifiable rewards; evaluation scores with the newest online stage's mix."""
    this = dict(run.stages())[name]
    online = [stage for _, stage in [*stages_before(run, name), (name, this)] if isinstance(stage, OnlineStage)]
    mix = online[-1].reward if online else RewardMix()
    models = [
        {"name": scorer, "kind": "model", "path": str(folder), "weight": mix.model_weight}
        for scorer, folder in reward_model_folders(run, name, run_dir).items()
    ]
    watch = this.watch if isinstance(this, RlStage) else None
    further = this.scorers if isinstance(this, EvaluateStage) else watch.scorers if watch is not None else {}
    # Without weight: they are read, and reward nothing.
    unused = [{"name": scorer, "kind": "model", "path": path, "weight": 0.0} for scorer, path in further.items()]
    verifiable = [{"kind": "verifiable", **reward.model_dump(exclude_none=True)} for reward in mix.verifiable]
    return models + unused + verifiable
