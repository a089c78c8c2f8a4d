"""The stage `release`: the newest policy as a plain folder with its model card, once its gates are passed.

    gates of the evaluations -> checksums of the policy -> model/ and README.md -> artifact store -> registry

In a cluster the controller takes it from there: it registers the candidate and gives it traffic step by step
(services.controller.release). On one machine `steersman serve RUN` serves the folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig

from steersman.artifacts import atomic_dir, file_digest, manifest_of_hashes, storage_errors, verify
from steersman.config.manifest import EvaluateStage, ReleaseStage, RlStage, StageOptions
from steersman.config.stages import data_files, policy_folder, read_complete, stage_digest, stages_before
from steersman.errors import FailedPreconditionError
from steersman.gates import check_gates, failed
from steersman.nn.load import load_tokenizer
from steersman.nn.prepare import check_tokenizer_matches
from steersman.registry import Registry
from steersman.report.schema import Evaluation, read_evaluation
from steersman.report.summary import criteria, label, mean_kl, no_eos, summarise
from training.context import StageContext
from training.evaluate import override_of, pass_gates

TRACKING_URI = "MLFLOW_TRACKING_URI"
"""MLflow's own variable: the registry of a release outside a cluster; inside one the controller registers."""
REGISTERED_MODEL = "steersman-chat"


def run_release(spec: ReleaseStage, context: StageContext) -> None:
    """Writes `model/` and `release.json`; may be repeated.

    Raises:
        FailedPreconditionError: a gate is not passed (the message has the figures), no evaluation with gates is about
            the model that would be released, or the model is not a plain folder.
        ChecksumError, NotFoundError: the policy's files are not those that its stage wrote.
    """
    evaluation = check_evaluations(context)
    source = context.policy_model
    _check_source(context, source)
    model = context.stage_dir / "model"
    context.reporter.activity("writing the model")
    with atomic_dir(model) as partial:
        ignore = shutil.ignore_patterns("README.md")  # of the base model; a link to it would be written through
        shutil.copytree(source, partial, dirs_exist_ok=True, copy_function=_link_or_copy, ignore=ignore)
        (partial / "README.md").write_text(model_card(context, evaluation), encoding="utf-8")
    uri = _upload(context, model)
    pointer = {
        "model": uri,
        "run": context.run.metadata.name,
        "stage": source.parent.name if source != context.base_model else None,
        "digest": stage_digest(context.run, context.name, context.run_dir),
        "files": manifest_of_hashes(model),
        "registered": _register(spec, context, uri),
    }
    with storage_errors(context.stage_dir):
        (context.stage_dir / "release.json").write_text(json.dumps(pointer, indent=2) + "\n", encoding="utf-8")
    context.reporter.note(f"released {uri}")


def check_evaluations(context: StageContext) -> Evaluation | None:
    """Checks the gates of every evaluation of the model to be released; returns the newest one, None without any."""
    newest: Evaluation | None = None
    override = override_of(context)
    elsewhere: list[str] = []
    released = policy_folder(context.run, context.name, context.run_dir)
    for name, stage in stages_before(context.run, context.name):
        if not isinstance(stage, EvaluateStage):
            continue
        if policy_folder(context.run, name, context.run_dir) != released:
            elsewhere += [name] if stage.gates else []
            continue
        newest = read_evaluation(context.run_dir / name / "evaluation.json")
        elsewhere.clear()
        pass_gates(stage, newest, override)
    if elsewhere:
        raise FailedPreconditionError(
            f"the gates of {elsewhere[-1]} were passed by an earlier model; put an evaluate stage behind the stage "
            "that makes the released one"
        )
    return newest


def _check_source(context: StageContext, source: Path) -> None:
    """The policy is what its stage wrote, and a folder that transformers loads without anything else."""
    if (source / "adapter_config.json").is_file() or not any(source.glob("*.safetensors")):
        raise FailedPreconditionError(
            f"{source} is not a plain model folder with *.safetensors; merge its adapter first"
        )
    if source != context.base_model:
        complete = read_complete(context.run_dir, source.parent.name)
        if complete is None:
            raise FailedPreconditionError(f"{source.parent.name} is not complete; run it before the release")
        files: dict[str, str] = complete["files"]  # type: ignore[assignment]
        context.reporter.activity("comparing the policy with its checksums")
        verify(source.parent, {name: digest for name, digest in files.items() if name.startswith("model/")})
    check_tokenizer_matches(AutoConfig.from_pretrained(source), load_tokenizer(source))


def _link_or_copy(source: str, target: str) -> None:
    """The weights exist once on the disk where it can link; nobody writes into a finished model folder."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def _upload(context: StageContext, model: Path) -> str:
    """Where the model lies: its folder, or with `spec.artifacts` its copy in the artifact store."""
    if context.spec.artifacts is None:
        return str(model)
    uri = f"{context.spec.artifacts.rstrip('/')}/{context.run.metadata.name}/{context.name}/model"
    store, path = fsspec.core.url_to_fs(uri)
    context.reporter.activity(f"copying the model to {uri}")
    for file in sorted(model.rglob("*")):
        if file.is_file():
            target = f"{path}/{file.relative_to(model).as_posix()}"
            store.makedirs(target.rpartition("/")[0], exist_ok=True)
            store.put_file(str(file), target)
    return uri


def _register(spec: ReleaseStage, context: StageContext, uri: str) -> dict[str, str] | None:
    """Points the aliases of an MLflow registry at the model; None where none is configured."""
    url = os.environ.get(TRACKING_URI)
    if not url:
        return None
    aliases = ["candidate"] if spec.canary or spec.inference_service else ["candidate", "champion"]
    digest = stage_digest(context.run, context.name, context.run_dir)

    async def point() -> str:
        registry = Registry(url, REGISTERED_MODEL)
        try:
            return [await registry.set_alias(alias, digest, context.run.metadata.name, uri) for alias in aliases][-1]
        finally:
            await registry.close()

    version = asyncio.run(point())
    context.reporter.note(f"{REGISTERED_MODEL} version {version} is {' and '.join(aliases)}")
    return {"model": REGISTERED_MODEL, "version": version, "aliases": ", ".join(aliases)}


# The model card


def model_card(context: StageContext, evaluation: Evaluation | None) -> str:
    """README.md of the model: where it comes from, how it was made, what was measured, what it is not for."""
    run, spec = context.run, context.spec
    base = Path(spec.model.base).name if Path(spec.model.base).is_absolute() else spec.model.base
    made_by = [one for one in stages_before(run, context.name) if not isinstance(one[1], EvaluateStage)]
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["steersman", *dict.fromkeys(_method(stage) for _, stage in made_by)],
        model_name=run.metadata.name if evaluation is not None else None,
        eval_results=eval_results(evaluation) if evaluation is not None else None,
    )
    made = [f"- `{name}`: {_method(stage)}" for name, stage in made_by]
    files = [
        f"- `{path.name}` sha256 `{file_digest(path)}`"
        for splits in data_files(run, context.run_dir).values()
        for path in splits.values()
        if path.is_file()
    ]
    revision = f" at revision {spec.model.revision}" if spec.model.revision else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {run.metadata.name}",
        f"`{base}`{revision}, aligned by Steersman with seed {spec.seed}. `config.yaml` of every stage and "
        "`manifest.yaml` of the run repeat it.",
        "## How it was made\n\n" + ("\n".join(made) or "The base model, unchanged."),
        "## What was measured\n\n" + (_measured(context, evaluation) if evaluation else "Nothing: no evaluate stage."),
        "## What it learned from\n\n" + ("\n".join(files) or "No files."),
        "## What it is not for\n\nIt answers as the people who judged its training data preferred, in their domain. "
        "Facts about customers, orders and prices must come from tools at answer time, not from its weights. The "
        "figures above hold for prompts like the held-out ones.",
    ]
    return "\n\n".join(parts) + "\n"


def eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """The card's `model-index`, in Hugging Face's format: reward, rubric, wins, suites and knowledge of the aligned
    model."""
    numbers, aligned = summarise(evaluation), evaluation.aligned
    own: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_name": "held-out prompts",
        "dataset_type": "steersman-prompts",
    }
    found = [
        EvalResult(**own, metric_type="reward", metric_name="mean reward", metric_value=numbers["reward"][aligned][0])
    ]
    if numbers["rubric"]:
        found += [
            EvalResult(
                **own, metric_type=f"rubric-{name}", metric_name=f"rubric: {label(name)}",
                metric_value=round(evaluation.interval(aligned, name).estimate, 4),
            )
            for name in ("total", *criteria(evaluation))
        ]  # fmt: skip
    found += [
        EvalResult(
            **own, metric_type=f"win-rate-{judge}", metric_value=rate[0],
            metric_name=f"win rate by {judge} against {label(evaluation.start)}",
        )
        for judge, rate in numbers.get("win_rate", {}).items()
    ]  # fmt: skip
    for suite, models in numbers.get("suites", {}).items():
        if aligned in models:
            about = own | {"dataset_name": f"suite {suite}", "dataset_type": f"steersman-suite-{suite}"}
            found.append(
                EvalResult(**about, metric_type="accuracy", metric_name="cases passed", metric_value=models[aligned][0])
            )
    for task, scores in numbers.get("knowledge", {}).items():
        about = own | {"dataset_name": task, "dataset_type": task}
        found.append(EvalResult(**about, metric_type="accuracy", metric_name="score", metric_value=scores["after"][0]))
    return found


def _method(stage: StageOptions) -> str:
    if isinstance(stage, RlStage):
        return stage.algorithm
    return stage.kind.replace("_", "-")


def _measured(context: StageContext, evaluation: Evaluation) -> str:
    numbers = summarise(evaluation)
    models = list(evaluation.models)
    lines = [
        f"{len(evaluation.models[evaluation.aligned])} held-out answers a model, mean with 95% interval.",
        "",
        "| | " + " | ".join(label(name) for name in models) + " |",
        "|---|" + "---|" * len(models),
    ]
    for title, row in (("reward", numbers["reward"]), ("rubric", numbers["rubric"])):
        if row:
            cells = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in (row[name] for name in models)]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    kls = [mean_kl(evaluation, name) for name in models]
    lines.append("| KL to the reference, nats | " + " | ".join("–" if kl is None else f"{kl:.2f}" for kl in kls) + " |")
    lines.append("| answers cut short | " + " | ".join(f"{no_eos(evaluation, name):.1%}" for name in models) + " |")
    mean, low, high = numbers[f"{evaluation.aligned}_minus_{evaluation.start}"]
    lines += ["", f"Gain in reward over {label(evaluation.start)}: {mean:.3f} ({low:.3f} to {high:.3f})."]
    if evaluation.reward_model is not None:
        lines.append(
            f"Held-out accuracy of the reward model: {numbers['rm_accuracy']:.3f}; "
            f"length alone: {numbers['length_baseline']:.3f}."
        )
    return "\n".join([*lines, *_gates(context, evaluation)])


def _gates(context: StageContext, evaluation: Evaluation) -> list[str]:
    """What the gates found, and who let the model through where one was not passed."""
    found = [
        finding
        for _, stage in context.run.stages()
        if isinstance(stage, EvaluateStage)
        for finding in check_gates(stage.gates, evaluation)
    ]
    if not found:
        return []
    lines = ["", "### Gates", "", *(f"- {'passed' if one.passed else '**failed**'}: {one.text}" for one in found), ""]
    override = override_of(context)
    if failed(found) and override is not None:
        lines.append(f"Released in spite of the failed gates by {override.name}: {override.reason}")
        lines.append("")
    lines.append(
        "A gate on an interval looks at one end of a 95% interval. All have to pass, so that together they let a model "
        "through that misses one of them with at most 2.5% (intersection-union test)."
    )
    return lines
