"""Knowledge before and after a run, asked once of its models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from steersman.artifacts import read_json
from steersman.knowledge import ask_knowledge, available, default_folder, write_tasks
from steersman.local.serve import find_model
from steersman.progress import ConsoleReporter

Scores = dict[str, dict[str, tuple[float, ...]]]
"""Task to model to the score of every question."""
DEMO_TASKS = ("truthfulqa_mc1", "truthfulqa_mc2", "mmlu_world_religions")
DEMO_QUESTIONS = 150
"""Of each task: what two cores answer in minutes."""


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


def ask_demo_knowledge(run_dir: Path, base: Path) -> Path | None:
    """Writes `knowledge.json` of base and aligned model; None where the harness or its files are not there.

    Models are asked once: the file notes of which model it is.
    """
    folder = default_folder()
    tasks = [task for task in DEMO_TASKS if task in available(folder)]
    if not tasks or find_spec("lm_eval") is None:
        return None
    model, _, _ = find_model(run_dir)
    made = (model.parent / "complete.json").read_text(encoding="utf-8")
    path = run_dir / "knowledge.json"
    known = read_json(path, "")
    if known is None or known.get("of") != made:
        with ConsoleReporter("knowledge") as reporter:
            reporter.activity(f"asking {', '.join(tasks)}")
            scores = compare_knowledge({"base": base, "rlhf": model}, folder, tasks, limit=DEMO_QUESTIONS)
        path.write_text(json.dumps({"of": made, "scores": scores}), encoding="utf-8")
    return path


def known_of(run_dir: Path) -> Scores:
    """What `ask_demo_knowledge` found; empty where it did not ask."""
    known = read_json(run_dir / "knowledge.json", "") or {}
    return {
        task: {name: tuple(values) for name, values in models.items()}
        for task, models in (known.get("scores") or {}).items()
    }
