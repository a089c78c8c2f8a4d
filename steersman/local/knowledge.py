"""Knowledge before and after a run, asked once of its models."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steersman.artifacts import read_json, storage_errors
from steersman.config.manifest import EvaluateStage, load_manifest
from steersman.config.stages import policy_folder, sft_folder
from steersman.errors import ConfigError
from steersman.knowledge import FOLDER_VARIABLE, ask_knowledge, available, default_folder, write_tasks
from steersman.local.folder import manifest_path
from steersman.progress import ConsoleReporter, say

Scores = dict[str, dict[str, tuple[float, ...]]]
"""Task to model to the score of every question."""
DEMO_TASKS = ("truthfulqa_mc1", "truthfulqa_mc2", "mmlu_world_religions")
DEMO_QUESTIONS = 150
"""Of each task: what two cores answer in minutes."""
QUESTIONS_VARIABLE = "STEERSMAN_KNOWLEDGE_QUESTIONS"
"""Environment variable with another number."""
KNOWLEDGE_FILE = "knowledge.json"


def compare_knowledge(
    models: Mapping[str, Path], folder: Path, tasks: Sequence[str], *, limit: int | None, device: str = "cpu",
    note: Callable[[str], None] = lambda text: None,
) -> Scores:  # fmt: skip
    """Every task of every model, on the same questions."""
    found: Scores = {task: {} for task in tasks}
    with tempfile.TemporaryDirectory(prefix="steersman-knowledge-") as files:
        write_tasks(folder, tasks, Path(files))
        for name, model in models.items():
            scores = ask_knowledge(str(model), tasks, Path(files), limit=limit, device=device, note=note)
            for task, values in scores.items():
                found[task][name] = values
    return found


def ask_demo_knowledge(run_dir: Path) -> bool | None:
    """Asks base, SFT's and the aligned model what `knowledge.json` does not hold yet: whether there was something.

    None: the questions or the harness are not there; where a folder was named, a line says why. The file grows model by
    model, so that what was asked before an interruption stays.
    """
    limit, tasks = _questions(), [task for task in DEMO_TASKS if task in available(default_folder())]
    if not tasks or find_spec("lm_eval") is None:
        if os.environ.get(FOLDER_VARIABLE):
            reason = (
                "lm-eval is not installed" if tasks else f"{default_folder()} holds none of {', '.join(DEMO_TASKS)}"
            )
            say("knowledge", f"not asked: {reason}")
        return None
    asked = False
    for name, (model, digest) in _models(run_dir).items():
        made = {"of": digest, "limit": limit, "tasks": tasks}
        known = _kept(run_dir)
        if (known.get(name) or {}).get("made") == made:
            continue
        with ConsoleReporter("knowledge") as reporter:
            reporter.activity(f"asking {name}: {', '.join(tasks)}")
            scores = compare_knowledge({name: model}, default_folder(), tasks, limit=limit)
        known[name] = {"made": made, "scores": {task: scores[task][name] for task in tasks}}
        with storage_errors(run_dir):
            partial = run_dir / f".{KNOWLEDGE_FILE}"
            partial.write_text(json.dumps({"models": known}), encoding="utf-8")
            partial.replace(run_dir / KNOWLEDGE_FILE)
        asked = True
    return asked


def known_of(run_dir: Path) -> Scores:
    """What `ask_demo_knowledge` found of the models that the run has now; empty where it did not ask all of them."""
    kept = _kept(run_dir)
    if not kept:
        return {}
    models = _models(run_dir)
    now = {name: kept[name] for name in models if name in kept and kept[name]["made"]["of"] == models[name][1]}
    if len(now) < len(models):
        return {}
    tasks = next(iter(now.values()))["scores"]
    return {task: {name: tuple(one["scores"][task]) for name, one in now.items()} for task in tasks}


def _models(run_dir: Path) -> dict[str, tuple[Path, str]]:
    """Folder and digest of every model that the newest evaluate stage compares, by its name there."""
    run = load_manifest(manifest_path(run_dir))
    name = next((name for name, stage in reversed(run.stages()) if isinstance(stage, EvaluateStage)), None)
    if name is None:
        return {}
    base = Path(json.loads((run_dir / "prepared.json").read_text(encoding="utf-8"))["base"])
    sft, policy = sft_folder(run, name, run_dir), policy_folder(run, name, run_dir)
    found = {"base": (base, str(base))}
    for model, folder in (("sft", sft), ("rlhf", policy if policy != sft else None)):
        if folder is not None:
            made = folder.parent / "complete.json"  # not there while the stage is done again
            found[model] = folder, hashlib.sha256(made.read_bytes()).hexdigest() if made.is_file() else ""
    return found


def _kept(run_dir: Path) -> dict[str, Any]:
    kept = read_json(run_dir / KNOWLEDGE_FILE, "remove the file, and it is asked again") or {}
    return dict(kept.get("models", {}))


def _questions() -> int:
    """Questions of each task, from the environment."""
    text = os.environ.get(QUESTIONS_VARIABLE, "")
    if not text:
        return DEMO_QUESTIONS
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise ConfigError(f"{QUESTIONS_VARIABLE} is {text!r}; give the number of questions of each task, from 1")
    return int(text)
