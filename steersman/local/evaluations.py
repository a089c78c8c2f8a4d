"""What a run's evaluate stages need, looked at before anything is trained: they come last, and what they lack would be
found out after everything else was paid for."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic.alias_generators import to_camel

from steersman.config.manifest import AlignmentRun, EvaluateStage
from steersman.environment import header_secret_in
from steersman.errors import ConfigError, meant
from steersman.suites.schema import Suite, read_suite


def check_evaluations(run: AlignmentRun, run_dir: Path) -> None:
    """Suites, questions of knowledge, judges' keys, the champion's folder, and that every gate has what it looks at.

    Raises:
        ConfigError, DataError: the stage and the field that is wrong.
    """
    for name, stage in run.stages():
        if not isinstance(stage, EvaluateStage):
            continue
        suites = [read_suite(run_dir / path) for path in stage.suites]
        double = next((one.name for one in suites if [other.name for other in suites].count(one.name) > 1), None)
        if double is not None:
            raise ConfigError(f"{name}.suites: two suites have the name {double}; results are compared by it")
        for judge in stage.judges:
            if judge.api_key_env is not None:
                header_secret_in(judge.api_key_env, f"{name}.judges.{judge.name}.apiKeyEnv")
        if stage.champion is not None and not (run_dir / stage.champion / "config.json").is_file():
            raise ConfigError(f"{name}.champion: {stage.champion} is no model folder (config.json); check the path")
        _check_knowledge(name, stage, run_dir)
        _check_gates(name, stage, suites)


def _check_knowledge(name: str, stage: EvaluateStage, run_dir: Path) -> None:
    from steersman.knowledge import write_tasks

    if stage.knowledge is not None:
        with tempfile.TemporaryDirectory(prefix="steersman-knowledge-") as scratch:
            try:
                write_tasks(run_dir / stage.knowledge.folder, stage.knowledge.tasks, Path(scratch))
            except ConfigError as error:
                raise ConfigError(f"{name}.knowledge: {error}") from None


def _check_gates(name: str, stage: EvaluateStage, suites: list[Suite]) -> None:
    """Refuses a gate that could not pass, because nothing measures what it looks at."""
    lacking = {
        "champion": None if stage.champion is not None else "champion",
        "knowledge": None if stage.knowledge is not None else "knowledge",
        "criteria": None if stage.checks else "checks",
        "suites": None if suites else "suites",
        "latency": None if suites else "suites",
        "safety": None if any(suite.kind == "safety" for suite in suites) else "suites of the kind safety",
        "leaks": None if any(suite.kind == "leak" for suite in suites) else "suites of the kind leak",
    }
    for gate, options in stage.gates:
        for wanted in () if options is None else (gate, getattr(options, "against", "")):
            if lacking.get(wanted) is not None:
                raise ConfigError(
                    f"{name}.gates.{to_camel(gate)} looks at {lacking[wanted]}, which the stage does not have; add it, "
                    "or remove the gate"
                )
        if gate == "win_rate" and options is not None:
            _must_be_known(
                f"{name}.gates.winRate.judge", options.judge, ["reward", *(one.name for one in stage.judges)]
            )
        if gate == "suites" and options is not None:
            for suite in options.each:
                _must_be_known(f"{name}.gates.suites.each", suite, [one.name for one in suites])


def _must_be_known(where: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ConfigError(f"{where}: there is no {name!r}, only {', '.join(known)}{meant(name, known)}")
