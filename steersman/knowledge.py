"""What a model knows: TruthfulQA, MMLU and GSM8K by lm-evaluation-harness (PyPI `lm-eval`), on local files.

The prompts, the scoring and the metrics are those of the harness's own tasks; only the questions come from another
place. A folder holds what the authors publish:

    truthfulqa/TruthfulQA.csv            truthfulqa_mc1, truthfulqa_mc2
    mmlu/{dev,test}/SUBJECT_{dev,test}.csv               mmlu_SUBJECT
    gsm8k/train.jsonl, gsm8k/test.jsonl  gsm8k

`write_tasks` makes the harness's task files of them, which `lm_eval --include_path` reads as well.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from steersman.data.sources import read_records
from steersman.errors import ConfigError, DataError, why

FOLDER_VARIABLE = "STEERSMAN_KNOWLEDGE"
"""Environment variable with the folder of the files."""
_LETTERS = ("A", "B", "C", "D")
_METRICS = {"gsm8k": "exact_match"}


def default_folder() -> Path:
    """Of the variable, or `knowledge` beside the prepared models."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache/steersman/knowledge")


def available(folder: Path) -> list[str]:
    """Names of the tasks whose files are in the folder."""
    found = ["truthfulqa_mc1", "truthfulqa_mc2"] if (folder / "truthfulqa/TruthfulQA.csv").is_file() else []
    subjects = sorted(path.name.removesuffix("_test.csv") for path in (folder / "mmlu").glob("test/*_test.csv"))
    found += [f"mmlu_{subject}" for subject in subjects if (folder / f"mmlu/dev/{subject}_dev.csv").is_file()]
    return found + (
        ["gsm8k"] if all((folder / f"gsm8k/{split}.jsonl").is_file() for split in ("train", "test")) else []
    )


def write_tasks(folder: Path, tasks: Sequence[str], out: Path) -> None:
    """The harness's task files, and the questions as they want them.

    Raises:
        ConfigError: the harness is not installed, or a task's files are not in the folder.
    """
    if not tasks:
        raise ConfigError(f"{folder} has no files of TruthfulQA, MMLU or GSM8K; docs/evaluation.md says where they lie")
    missing = [task for task in tasks if task not in available(folder)]
    if missing:
        there = ", ".join(available(folder)) or "none"
        raise ConfigError(f"{folder} has no files for {missing[0]}; there are {there}")
    out.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        config: dict[str, Any] = {"task": task, "dataset_path": "json", "dataset_name": None}
        if task.startswith("truthfulqa"):
            files = {"validation": _jsonl(out / "truthfulqa.jsonl", _truthfulqa, folder / "truthfulqa/TruthfulQA.csv")}
            config["include"] = str(_harness() / f"truthfulqa/{task}.yaml")
        elif task == "gsm8k":
            files = {
                split: _jsonl(out / f"gsm8k.{split}.jsonl", _gsm8k, folder / f"gsm8k/{split}.jsonl")
                for split in ("train", "test")
            }
            config["include"] = str(_harness() / "gsm8k/gsm8k.yaml")
        else:
            subject = task.removeprefix("mmlu_")
            places = {"dev": f"dev/{subject}_dev.csv", "test": f"test/{subject}_test.csv"}
            files = {
                split: _jsonl(out / f"{task}.{split}.jsonl", _mmlu, folder / "mmlu" / name)
                for split, name in places.items()
            }
            config["include"] = str(_harness() / f"mmlu/default/{task}.yaml")
        config["dataset_kwargs"] = {"data_files": files}
        (out / f"{task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def ask_knowledge(
    target: str,
    tasks: Sequence[str],
    task_files: Path,
    *,
    limit: int | None = None,
    model_name: str | None = None,
    key_env: str | None = None,
    tokenizer: Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 8,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, tuple[float, ...]]:
    """Score of every question by task, in the order of the files.

    Args:
        target: a model folder, or the URL of an OpenAI-compatible endpoint.
        task_files: folder that `write_tasks` filled.
        limit: only the first questions of each task.
        model_name, key_env: of an endpoint, see `steersman.suites.asking.Endpoint`.
        tokenizer: folder of the endpoint's model or tokenizer; tasks that compare given answers need it.

    Raises:
        ConfigError: lm-eval is not installed, or there is no tokenizer and a task needs it.
        UnavailableError: an endpoint that tells no log-probabilities of a prompt.
    """
    _harness()
    note(f"knowledge: {', '.join(tasks)}")
    if not target.startswith(("http://", "https://")):
        from steersman.nn.harness import FolderModel

        model = FolderModel(pretrained=target, dtype=dtype, device=device, batch_size=batch_size)
        return _evaluated(model, tasks, task_files, limit)
    compared = [task for task in tasks if task not in _METRICS]
    if compared and tokenizer is None:
        raise ConfigError(
            f"{compared[0]} compares how likely given answers are, in tokens of the endpoint's model; name its folder "
            "with --tokenizer FOLDER, or ask only gsm8k"
        )
    from steersman.nn.harness import EndpointModel
    from steersman.nn.load import load_tokenizer
    from steersman.suites.asking import Endpoint

    known = None if tokenizer is None else load_tokenizer(tokenizer)
    with Endpoint(target, model_name, key_env=key_env) as endpoint:
        return _evaluated(EndpointModel(endpoint, known, _context(tokenizer)), tasks, task_files, limit)


def _context(folder: Path | None) -> int:
    """Tokens that the model of a folder takes; 2,048, as the harness has it, where nothing says so."""
    from transformers import AutoConfig

    from steersman.nn.load import context_of

    if folder is None or not (folder / "config.json").is_file():
        return 2048
    return context_of(AutoConfig.from_pretrained(folder).get_text_config(decoder=True))


def _evaluated(model: Any, tasks: Sequence[str], task_files: Path, limit: int | None) -> dict[str, tuple[float, ...]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    result = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), limit=limit, log_samples=True, bootstrap_iters=0, random_seed=0,
        task_manager=TaskManager(include_path=str(task_files), include_defaults=False),
    )  # fmt: skip
    assert result is not None  # only on other ranks than the first
    return {task: _scores(task, result["samples"][task]) for task in tasks}


def _scores(task: str, samples: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """One score a question; gsm8k's is that of its `flexible-extract` filter."""
    metric = _METRICS.get(task, "acc")
    kept = [row for row in samples if row.get("filter", "none") in ("none", "flexible-extract")]
    return tuple(float(row[metric]) for row in sorted(kept, key=lambda row: row["doc_id"]))


def _harness() -> Path:
    """Folder of the harness's tasks."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ConfigError("knowledge needs lm-eval; pip install 'steersman[knowledge]'")
    return Path(spec.origin).parent / "tasks"


def _truthfulqa(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of the `multiple_choice` configuration: in mc1 the best answer is right, in mc2 all correct ones are."""
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                best, right, wrong = (
                    row["Best Answer"].strip(),
                    _parts(row["Correct Answers"]),
                    _parts(row["Incorrect Answers"]),
                )
            except (KeyError, AttributeError):
                raise DataError(f"{path}:{number}: not a row of TruthfulQA.csv; take the authors' file") from None
            if not (row["Question"] and best and right and wrong):
                raise DataError(f"{path}:{number}: a question needs right and wrong answers; take the authors' file")
            yield {
                "question": row["Question"],
                "mc1_targets": {"choices": [best, *wrong], "labels": [1] + [0] * len(wrong)},
                "mc2_targets": {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)},
            }


def _parts(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


def _mmlu(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 6 or row[5].strip() not in _LETTERS:
                raise DataError(
                    f"{path}:{number}: a row has a question, four choices and a letter; take the authors' file"
                )
            yield {"question": row[0], "choices": row[1:5], "answer": _LETTERS.index(row[5].strip())}


def _gsm8k(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in read_records(path):
        if isinstance(row, DataError):
            raise row
        if not all(isinstance(row.get(name), str) for name in ("question", "answer")):
            raise DataError(f"{path}:{number}: a row has question and answer; take the authors' file")
        yield {name: row[name] for name in ("question", "answer")}


def _jsonl(path: Path, rows_of: Callable[[Path], Iterator[dict[str, Any]]], source: Path) -> str:
    try:
        text = "".join(json.dumps(row) + "\n" for row in rows_of(source))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source}: cannot be read ({why(error)}); take the authors' file, which is UTF-8") from None
    if not text:
        raise DataError(f"{source}: no questions; take the authors' file")
    path.write_text(text, encoding="utf-8")
    return str(path.resolve())
