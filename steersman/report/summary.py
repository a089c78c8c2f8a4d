"""The numbers of an evaluation: one JSON object for machines, one table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from steersman.inference import equivalence
from steersman.report import overoptimisation
from steersman.report.schema import Evaluation
from steersman.report.wins import WinRate, win_rate
from steersman.statistics import Interval, mean_interval, wilson_interval
from steersman.suites.verdicts import share

LABELS = {
    "base": "base",
    "sft": "SFT",
    "rlhf": "RLHF",
    "rejectionSampling": "rejection sampling",
    "no_invented": "nothing invented",
    "total": "rubric total",
}
"""How names of models and criteria read in tables and plots."""


def label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def criteria(evaluation: Evaluation) -> list[str]:
    """Rubric criteria in the order of the data, without the total."""
    first = next(iter(evaluation.models.values()))[0]
    return [name for name in first.rubric if name != "total"]


def no_eos(evaluation: Evaluation, model: str) -> float:
    """Share of answers that were cut instead of ended."""
    samples = evaluation.models[model]
    return sum(sample.finish_reason == "length" for sample in samples) / len(samples)


def mean_kl(evaluation: Evaluation, model: str) -> float | None:
    """Mean KL to the reference policy in nats per answer, None where it was not measured."""
    values = [sample.kl for sample in evaluation.models[model] if sample.kl is not None]
    return sum(values) / len(values) if values else None


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """The result as JSON: what `make demo-check` prints. Intervals are [estimate, low, high] at 95%."""
    start, aligned = evaluation.start, evaluation.aligned
    has_rubric = bool(criteria(evaluation))
    rewards = {name: list(evaluation.scores(name).values()) for name in evaluation.models}
    judged = list(evaluation.models) if has_rubric else []
    measures: list[str | None] = [None, "total", *criteria(evaluation)] if has_rubric else [None]
    result: dict[str, Any] = {
        "seconds": {**_rounded(evaluation.seconds), "total": round(sum(evaluation.seconds.values()), 2)},
        "peak_memory_gib": evaluation.peak_memory_gib,
        "reward": {name: _triple(evaluation.interval(name)) for name in rewards},
        f"{aligned}_minus_{start}": _triple(evaluation.change(start, aligned).difference),
        "bootstrap": {name or "reward": _triple(evaluation.bootstrap(start, aligned, name)) for name in measures},
        "rubric": {name: _triple(evaluation.interval(name, "total")) for name in judged},
        "kl": {name: kl if kl is None else round(kl, 4) for name in rewards for kl in [mean_kl(evaluation, name)]},
        "no_eos": {name: round(no_eos(evaluation, name), 4) for name in evaluation.models},
        "missing_rewards": {name: len(evaluation.models[name]) - len(values) for name, values in rewards.items()},
        "logprob_mismatch": evaluation.logprob_mismatch,
        "seed": evaluation.seed,
    }
    if has_rubric:
        difference = evaluation.change(start, aligned, "total").difference
        result[f"rubric_{aligned}_minus_{start}"] = _triple(difference)
        result["criteria"] = {
            name: _triple(evaluation.change(start, aligned, name).difference) for name in criteria(evaluation)
        }
    if start != aligned:
        result["win_rate"] = {judge: _triple(found.rate) for judge, found in win_rates(evaluation).items()}
        result["scorers"] = {
            name: _triple(evaluation.change(start, aligned, f"scores.{name}").difference) for name in evaluation.scorers
        }
    if evaluation.judges:
        result["judges"] = {
            name: {
                "model": judge.model,
                "comparisons": len(judge.pairs),
                **judge.model_dump(exclude={"pairs", "model", "reason"}),
            }
            for name, judge in evaluation.judges.items()
        }
    if evaluation.licences:
        result["licences"] = {name: one.model_dump(exclude={"text"}) for name, one in evaluation.licences.items()}
    if evaluation.suites:
        result["suites"] = {}
        for suite in evaluation.suites:
            result["suites"].setdefault(suite.suite, {})[suite.target] = _triple(share(suite))
    if evaluation.knowledge:
        result["knowledge"] = knowledge(evaluation)
    if evaluation.watched is not None:
        watched = evaluation.watched
        result["overoptimisation"] = overoptimisation.summary(watched.looks, watched.planned, watched.false_alarms)
    if evaluation.reward_model:
        result["rm_accuracy"] = round(evaluation.reward_model.accuracy, 4)
        result["length_baseline"] = round(evaluation.reward_model.length_baseline, 4)
    return result


def win_rates(evaluation: Evaluation) -> dict[str, WinRate]:
    """How often the aligned model wins against the one before it, by `reward` and by every judge that compared both."""
    start, aligned = evaluation.start, evaluation.aligned
    found = {}
    for judge in ("reward", *evaluation.judges):
        duels = evaluation.duels(judge)
        if any({duel.one, duel.other} == {start, aligned} for duel in duels):
            found[judge] = win_rate(duels, aligned, start)
    return found


KNOWLEDGE_BOUND = 0.03
"""Difference of a task's score that does not matter, where no gate says another one."""


def knowledge(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Every task before (the base model, or the one that the gate compares with) and after: means with intervals, the
    paired difference, and whether it is equivalent within `bound`; and the mean of every model that was asked."""
    gate = evaluation.settings.get("gates", {}).get("knowledge") or {}
    bound, against = gate.get("drop", KNOWLEDGE_BOUND), gate.get("against", "base")
    wanted = evaluation.start if against == "start" else against
    found = {}
    for task, scores in evaluation.knowledge.items():
        names = list(scores)
        before, after = wanted if wanted in scores else names[0], names[-1]
        result = equivalence(scores[before], scores[after], bound)
        found[task] = {
            "before": _triple(mean_interval(scores[before])),
            "after": _triple(mean_interval(scores[after])),
            "difference": _triple(result.difference),
            "bound": bound,
            "equivalent": result.equivalent,
            "questions": len(scores[before]),
            "models": {name: _triple(mean_interval(values)) for name, values in scores.items()},
        }
    return found


def verdict(evaluation: Evaluation) -> str:
    """Where the aligned model is better and where not, criterion by criterion; empty without a rubric.

    A criterion is better or worse where the interval of its paired difference leaves out 0.
    """
    names = criteria(evaluation)
    if not names or evaluation.start == evaluation.aligned:
        return ""
    changes = {name: evaluation.change(evaluation.start, evaluation.aligned, name).difference for name in names}
    return f"By the rubric's criteria {told_apart({label(name): change for name, change in changes.items()})}."


def told_apart(changes: Mapping[str, Interval]) -> str:
    """What is better, what is worse and what may be either, by the intervals of differences; empty for none."""
    groups = {
        "better": [name for name, change in changes.items() if change.low > 0],
        "worse": [name for name, change in changes.items() if change.high < 0],
        "no certain change": [name for name, change in changes.items() if change.low <= 0 <= change.high],
    }
    return "; ".join(f"{title}: {', '.join(found)}" for title, found in groups.items() if found)


def render_table(evaluation: Evaluation) -> Table:
    """Before and after, side by side, for the terminal."""
    start, aligned = evaluation.start, evaluation.aligned
    table = Table(
        title=f"{evaluation.name}: {evaluation.prompts} {evaluation.kind}, mean with 95% interval",
        caption=_caption(evaluation),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for name in evaluation.models:
        table.add_column(label(name), justify="right", no_wrap=True, style="bold" if name == aligned else "")
    if start != aligned:
        table.add_column(f"{label(aligned)} − {label(start)}", justify="right", no_wrap=True)

    table.add_row("reward", *_row(evaluation, None))
    for criterion in [*(["total"] if criteria(evaluation) else []), *criteria(evaluation)]:
        table.add_row(label(criterion), *_row(evaluation, criterion))
    table.add_section()
    kls = [mean_kl(evaluation, name) for name in evaluation.models]
    table.add_row("KL, nats", *("–" if kl is None else f"{kl:.2f}" for kl in kls))
    lengths = [sum(s.length for s in items) / len(items) for items in evaluation.models.values()]
    table.add_row("tokens", *(f"{length:.1f}" for length in lengths))
    table.add_row("cut short", *(f"{no_eos(evaluation, name):.1%}" for name in evaluation.models))
    return table


def _row(evaluation: Evaluation, criterion: str | None) -> list[str]:
    """Cells of one score: a mean per model and the paired difference, green where it is surely better."""
    cells = [_cell(evaluation.interval(name, criterion)) for name in evaluation.models]
    if evaluation.start != evaluation.aligned:
        difference = evaluation.change(evaluation.start, evaluation.aligned, criterion).difference
        colour = "green" if difference.low > 0 else "red" if difference.high < 0 else "default"
        cells.append(f"[{colour}]{_cell(difference, '+')}[/]")
    return cells


def _cell(interval: Interval, sign: str = "") -> str:
    return f"{interval.estimate:{sign}.2f} ± {interval.high - interval.estimate:.2f}"


def _caption(evaluation: Evaluation) -> str:
    lines = [verdict(evaluation)]
    if evaluation.reward_model is not None:
        model = evaluation.reward_model
        accuracy = wilson_interval(model.accuracy * len(model.pairs), len(model.pairs))
        lines.append(
            f"Reward model: held-out accuracy {accuracy.estimate:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f}), "
            f"by length alone {model.length_baseline:.3f}."
        )
    return "\n".join(line for line in lines if line)


def _triple(interval: Interval) -> list[float]:
    return [round(value, 4) for value in interval]


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}
