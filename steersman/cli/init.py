"""`steersman init`: a folder with a commented manifest and checked data, to run and to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

if TYPE_CHECKING:
    from steersman.data.records import Row

Recipe = Literal["sft", "dpo", "kto", "ppo", "rloo", "grpo", "rejection-sampling"]

_NEEDS: dict[str, str | None] = {"sft": "demonstrations", "dpo": "preferences", "kto": "feedback"}
"""The one kind of rows that a recipe cannot do without; the others need preferences."""
_HELD_OUT = 5
"""Of so many prompts one is kept for the evaluation."""
_FEWEST_STEPS = 8
"""Optimizer steps that a small file should at least give."""


def init(
    folder: Annotated[Path, typer.Argument(help="New folder; its name becomes the run's.")],
    recipe: Annotated[str, typer.Option(help=f"What to train: {', '.join(get_args(Recipe))}.")] = "ppo",
    base: Annotated[str, typer.Option(help="Base model: a folder or a hub id.")] = "smollm2-135m-instruct",
    demonstrations: Annotated[Path | None, typer.Option(help='JSONL rows {"messages": [...]}.')] = None,
    preferences: Annotated[
        Path | None, typer.Option(help='JSONL rows {"prompt": [...], "chosen": [...], "rejected": [...]}.')
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option(help='JSONL rows {"prompt": [...], "completion": [...], "label": true}.')
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSONL rows {"prompt": [...]}.')] = None,
) -> None:
    """Make a folder with a commented run.yaml and checked data; without files the demo's data are generated."""
    from steersman.config.base import commented_yaml, load_model
    from steersman.config.manifest import AlignmentRun
    from steersman.errors import ConfigError, ConflictError, meant

    recipes = get_args(Recipe)
    if recipe not in recipes:
        raise ConfigError(f"--recipe {recipe!r}: choose from {', '.join(recipes)}{meant(recipe, recipes)}")
    if folder.exists():
        raise ConflictError(f"{folder} exists already; name a new folder")
    given = {
        kind: path
        for kind, path in {
            "demonstrations": demonstrations,
            "preferences": preferences,
            "feedback": feedback,
            "prompts": prompts,
        }.items()
        if path is not None
    }
    need = _NEEDS.get(recipe, "preferences")
    if given and need not in given:
        raise ConfigError(f"--recipe {recipe} needs --{need}; give the file, or no file at all for the demo's data")
    rows = {kind: _read(kind, path) for kind, path in given.items()}
    data, files = _data(rows) if given else ({"demo": {}}, {})
    base = str(Path(base).absolute()) if Path(base).is_dir() else base
    document = {
        "apiVersion": "steersman.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": _run_name(folder)},
        "spec": {
            "model": {"base": base},
            "data": data,
            "stages": _stages(recipe, rows, evaluated=not given or "prompts" in data),
        },
    }
    load_model(AlignmentRun, document, "the manifest")
    _write(folder, files, commented_yaml(AlignmentRun, document, _HEAD.format(recipe=recipe)))
    for name, kept in files.items():
        typer.echo(f"{folder / name}: {len(kept)} rows")
    typer.echo(f"{folder / 'run.yaml'}: look at it, then  steersman run -f {folder / 'run.yaml'}")


_HEAD = """\
Made by `steersman init --recipe {recipe}`. What is not here has its default:
steersman run -f THIS --dry-run shows every field; steersman validate -f THIS checks it before anything is spent.
"""


def _read(kind: str, path: Path) -> list[Row]:
    from steersman.data.records import ROWS_OF, read_jsonl

    return list(read_jsonl(path, ROWS_OF[kind]))


def _data(rows: dict[str, list[Row]]) -> tuple[dict[str, Any], dict[str, Sequence[Row]]]:
    """The manifest's data and the files to write: rows as given, prompts apart for training and evaluation."""
    from steersman.data.records import Prompt

    data: dict[str, Any] = {}
    files: dict[str, Sequence[Row]] = {}
    for kind, found in rows.items():
        if kind != "prompts":
            data[kind] = {"train": f"data/{kind}.jsonl"}
            files[f"data/{kind}.jsonl"] = found
    source = rows.get("prompts") or rows.get("preferences")
    if source is None:
        return data, files
    distinct = list({str(row.prompt): Prompt(prompt=row.prompt) for row in source if isinstance(row, Prompt)}.values())
    held_out = distinct[::_HELD_OUT] if len(distinct) >= _HELD_OUT else []
    train = [prompt for prompt in distinct if prompt not in held_out]
    splits = {"train": train, "heldout": held_out}
    data["prompts"] = {split: f"data/prompts.{split}.jsonl" for split, some in splits.items() if some}
    files |= {f"data/prompts.{split}.jsonl": some for split, some in splits.items() if some}
    return data, files


def _stages(recipe: str, rows: dict[str, list[Row]], *, evaluated: bool) -> list[dict[str, Any]]:
    """Stages with what people change first; sizes that small files can be learned from."""
    stages: list[dict[str, Any]] = []
    if not rows or "demonstrations" in rows:
        stages.append({"sft": _sizes(rows.get("demonstrations"))})
    if recipe in ("dpo", "kto"):
        stages.append({recipe: _sizes(rows.get("preferences" if recipe == "dpo" else "feedback"))})
    elif recipe != "sft":
        stages.append({"rewardModel": _sizes(rows.get("preferences"))})
        generation = {"maxNewTokens": 128, "temperature": 0.7}
        if recipe == "rejection-sampling":
            stages.append({"rejectionSampling": {"generation": generation}})
        else:
            online: dict[str, Any] = {"algorithm": recipe, "steps": 20}
            stages.append({"rl": {**online, "promptsPerStep": 8, "samplesPerPrompt": 4, "generation": generation}})
        if evaluated:
            stages.append({"evaluate": {"generation": generation}})
    return stages


def _sizes(rows: Sequence[Row] | None) -> dict[str, Any]:
    if rows is None:
        return {"epochs": 1, "batchSize": 8}
    batch = max(1, min(8, len(rows) // _FEWEST_STEPS))
    return {"epochs": 1 if len(rows) >= 64 * batch else 3, "batchSize": batch, "microBatchSize": batch}


def _run_name(folder: Path) -> str:
    """The folder's name as a DNS label."""
    name = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in folder.name.lower())
    return name.strip("-")[:53].strip("-") or "run"


def _write(folder: Path, files: dict[str, Sequence[Row]], manifest: str) -> None:
    from steersman.artifacts import atomic_dir
    from steersman.data.records import write_jsonl

    with atomic_dir(folder) as partial:
        for name, rows in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(partial / name, rows)
        (partial / "run.yaml").write_text(manifest, encoding="utf-8")
