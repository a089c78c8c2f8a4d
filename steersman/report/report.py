"""Writes the report of a run: `report.html`, which carries everything in one file, and its plots as PNG files."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from steersman.errors import DataError
from steersman.report import plots
from steersman.report.evidence import evidence
from steersman.report.pages import environment, flat
from steersman.report.schema import Evaluation, Sample
from steersman.report.summary import criteria, label, mean_kl, no_eos, verdict
from steersman.report.terms import TERMS
from steersman.statistics import (
    Interval,
    variance_change,
    wilson_interval,
)

DPI = 160
EXAMPLES = 6


class Plot(NamedTuple):
    """A plot with what a reader should take from it."""

    training: bool
    """A curve of a training stage, not of the evaluation."""

    name: str
    title: str
    caption: str
    figure: Figure


def write_report(run_dir: Path, evaluation: Evaluation, out_dir: Path) -> Path:
    """Write `report.html` and `plots/*.png` into `out_dir` and return the path of the HTML file.

    `run_dir` is searched for `metrics.jsonl` files, one per stage; the folder's name is the stage's name.
    """
    drawn = _plots(evaluation, stage_metrics(run_dir))
    (out_dir / "plots").mkdir(parents=True, exist_ok=True)
    images = []
    for plot in drawn:
        (out_dir / "plots" / f"{plot.name}.png").write_bytes(_png(plot.figure))
        images.append({"plot": plot, "address": plots.as_image(plot.figure)})
    html = (
        environment()
        .get_template("report.html.j2")
        .render(
            evaluation=evaluation,
            kind=evaluation.kind,
            start=evaluation.start,
            aligned=evaluation.aligned,
            colours=plots.colours(list(evaluation.models)),
            images=images,
            examples=pick_examples(evaluation, EXAMPLES),
            evidence=evidence(evaluation),
            settings=flat(evaluation.settings, "evaluate") if evaluation.settings else {},
            terms=TERMS,
            **_numbers(evaluation),
        )
    )
    path = out_dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def stage_metrics(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Name of every stage that trained to the rows of its `metrics.jsonl`, oldest stage first.

    A last line without a line end is the torn write of a killed run and is left out; any other bad line is an error.
    """
    stages = {}
    for path in sorted(run_dir.rglob("metrics.jsonl"), key=lambda found: (found.stat().st_mtime_ns, str(found))):
        if path.parent.name.startswith("evaluate"):
            continue  # a row for every model, which is no curve
        rows = []
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); remove the line or the file.") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a metrics row must be a JSON object; remove the line or the file.")
            rows.append(row)
        stages[path.parent.name] = rows
    return stages


def pick_examples(evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
    """Prompts from the greatest gain to the greatest loss in reward, evenly by rank, so that failures show too."""
    before, after = evaluation.scores(evaluation.start), evaluation.scores(evaluation.aligned)
    common = sorted((key for key in before if key in after), key=lambda key: (before[key] - after[key], key))
    count = min(count, len(common))
    keys = [common[round(index * (len(common) - 1) / max(1, count - 1))] for index in range(count)]
    answers: dict[str, dict[str, Sample]] = {
        model: {sample.prompt_id: sample for sample in samples} for model, samples in evaluation.models.items()
    }
    return [
        {
            "prompt": answers[evaluation.aligned][key].prompt,
            "change": after[key] - before[key],
            "answers": {model: samples[key] for model, samples in answers.items()},
        }
        for key in keys
    ]


def _plots(evaluation: Evaluation, stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Plot]:
    found = [
        Plot(
            False,
            "rewards",
            "Reward",
            f"Each dot is an answer to one of the {evaluation.kind}. The change is measured prompt by prompt, so that "
            "easy and hard prompts do not blur it; the grey band is the 95% interval of its mean.",
            plots.reward_distributions(evaluation),
        )
    ]
    rubric = plots.rubric_by_criterion(evaluation)
    if rubric is not None:
        found.append(
            Plot(
                False,
                "rubric",
                "Rubric",
                "A reward model can be fooled. The rubric is computed from the facts and was never used in training.",
                rubric,
            )
        )
    if evaluation.reward_model:
        found.append(
            Plot(
                False,
                "reward_model",
                "Reward model",
                "On comparisons it was not trained on. Calibration: when the model is 80% sure, it should be right in "
                "80% of the pairs. The dashed line is what one reaches by looking at the answers' length only.",
                plots.reward_model_quality(evaluation.reward_model),
            )
        )
    found.append(
        Plot(
            False,
            "length",
            "Length and reward",
            "If reward were bought by longer answers, the points would rise to the right.",
            plots.length_against_reward(evaluation),
        )
    )
    by_kl = plots.scores_by_kl(evaluation.watched.looks) if evaluation.watched else None
    if by_kl is not None:
        found.append(
            Plot(
                False,
                "scores_by_kl",
                "Reward and unseen scorers along training",
                "The same prompts at several checkpoints, means with 95% intervals. Where the reward goes on rising "
                "and a scorer that training never uses falls, the reward is being exploited. Dotted: the recommended "
                "checkpoint.",
                by_kl,
            )
        )
    for stage, rows in stages.items():
        figure = plots.training_curves(stage, rows)
        if figure is not None:
            found.append(
                Plot(True, f"training_{stage}", f"Stage {stage}", "Faint: every step; solid: running mean.", figure)
            )
    return found


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    """Everything the template prints."""
    start, aligned = evaluation.start, evaluation.aligned
    before, after, prompts = evaluation.paired(start, aligned)
    scores: list[tuple[str, str | None]] = [("reward", None)]
    if criteria(evaluation):
        scores += [(label(name), name) for name in ("total", *criteria(evaluation))]
    rows = [
        {
            "label": name,
            "term": {None: "reward", "total": "rubric"}.get(criterion, ""),
            "means": {m: evaluation.interval(m, criterion) for m in evaluation.models},
            "change": evaluation.change(start, aligned, criterion),
        }
        for name, criterion in scores
    ]
    spread = min(len(set(before)), len(set(after))) > 1
    model = evaluation.reward_model
    accuracy: Interval | None = wilson_interval(model.accuracy * len(model.pairs), len(model.pairs)) if model else None
    return {
        "rows": rows,
        "verdict_by_criteria": verdict(evaluation),
        "reward": rows[0]["change"],
        "rubric": rows[1]["change"] if len(rows) > 1 else None,
        "bootstrap": evaluation.bootstrap(start, aligned),
        "variance": variance_change(before, after, clusters=prompts) if spread else None,
        "rm_accuracy": accuracy,
        "models": [
            {
                "name": name,
                "kl": mean_kl(evaluation, name),
                "no_eos": no_eos(evaluation, name),
                "length": sum(sample.length for sample in samples) / len(samples),
                "missing": sum(sample.reward is None for sample in samples),
            }
            for name, samples in evaluation.models.items()
        ],
    }


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # A fixed Software entry keeps the bytes the same for the same matplotlib.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": "steersman"})
    return buffer.getvalue()
