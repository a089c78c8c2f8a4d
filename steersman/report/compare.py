"""Compares runs on one page: metrics, distributions, wins, suites, knowledge, configuration, answers side by side.

Of every run the aligned model takes part. Answers are paired by the ids of prompt and sample, where the prompts are the
same; runs without common prompts are shown beside each other without a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from steersman.errors import DataError
from steersman.report import plots
from steersman.report.pages import environment, flat
from steersman.report.schema import Evaluation, Sample, prompt_of
from steersman.report.summary import criteria, label, mean_kl, told_apart
from steersman.report.wins import Duel, matrix
from steersman.statistics import Interval, compare, mean_interval
from steersman.suites.verdicts import share


@dataclass(frozen=True)
class Version:
    """One run."""

    name: str
    evaluation: Evaluation
    manifest: Mapping[str, Any]
    """The resolved manifest's spec, as plain data."""

    @property
    def samples(self) -> dict[str, Sample]:
        return {sample.prompt_id: sample for sample in self.evaluation.models[self.evaluation.aligned]}

    def scores(self, criterion: str | None) -> dict[str, float]:
        return self.evaluation.scores(self.evaluation.aligned, criterion)


def write_compare(versions: Sequence[Version], out: Path) -> Path:
    """Writes `compare.html`, one file, and returns its path.

    Raises:
        DataError: fewer than two runs, or two of one name.
    """
    names = [version.name for version in versions]
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(f"there must be at least two runs with names of their own to compare, not {', '.join(names)}")
    rows = _metrics(versions)
    columns = [
        {
            "name": version.name,
            "evaluation": version.evaluation,
            "kl": mean_kl(version.evaluation, version.evaluation.aligned),
            "length": sum(sample.length for sample in version.samples.values()) / len(version.samples),
        }
        for version in versions
    ]
    html = environment().get_template("compare.html.j2").render(
        names=names, columns=columns, rows=rows, headline=_headline(versions, rows), image=_distributions(versions),
        suites=_suites(versions), knowledge=_knowledge(versions), differences=_differences(versions),
        examples=_examples(versions), unit=_unit(versions[-1]), colours=plots.colours(names), **_wins(versions),
    )  # fmt: skip
    path = out / "compare.html"
    path.write_text(html, encoding="utf-8")
    return path


def _common(first: Version, other: Version) -> list[str]:
    """Ids that both have, of the same prompt."""
    one, two = first.samples, other.samples
    return [key for key in one if key in two and one[key].prompt == two[key].prompt]


def _metrics(versions: Sequence[Version]) -> list[dict[str, Any]]:
    names: list[str | None] = [None]
    for version in versions:
        own = criteria(version.evaluation)
        names += [name for name in (*(["total"] if own else []), *own) if name not in names]
    return [
        {"label": "reward" if name is None else label(name), "cells": [_cell(versions[0], v, name) for v in versions]}
        for name in names
    ]


def _cell(first: Version, version: Version, criterion: str | None) -> dict[str, Any] | None:
    scores = version.scores(criterion)
    if len({prompt_of(key) for key in scores}) < 2:
        return None
    mean = mean_interval(list(scores.values()), clusters=list(map(prompt_of, scores)))
    before = first.scores(criterion)
    keys = [key for key in _common(first, version) if key in before and key in scores]
    change = None
    if version is not first and len(set(map(prompt_of, keys))) > 1:
        change = compare(
            [before[key] for key in keys], [scores[key] for key in keys], clusters=list(map(prompt_of, keys))
        ).difference
    return {"mean": mean, "change": change}


def _headline(versions: Sequence[Version], rows: Sequence[Mapping[str, Any]]) -> str:
    """Where each run is surely better and worse than the first one."""
    first, said = versions[0], []
    for place, version in enumerate(versions[1:], start=1):
        changes = {row["label"]: row["cells"][place]["change"] for row in rows if row["cells"][place] is not None}
        known = {title: change for title, change in changes.items() if change is not None}
        nothing = "no scores in common" if _common(first, version) else "no prompts in common"
        said.append(f"{version.name} against {first.name}: {told_apart(known) or nothing}.")
    return " ".join(said)


def _wins(versions: Sequence[Version]) -> dict[str, Any]:
    """By the rubric's total, which is one scale for all runs, or else by reward."""
    by = "total" if all(version.scores("total") for version in versions) else None
    duels: list[Duel] = []
    for one, other in combinations(versions, 2):
        first, second = one.scores(by), other.scores(by)
        duels += [
            Duel(
                prompt_of(key),
                one.name,
                other.name,
                0.5 if first[key] == second[key] else float(first[key] > second[key]),
            )
            for key in _common(one, other)
            if key in first and key in second
        ]
    rows = matrix(duels, [version.name for version in versions])
    return {"wins": [{"by": "the rubric's total" if by else "reward", "rows": rows, "judge": None}] if rows else []}


def _suites(versions: Sequence[Version]) -> list[dict[str, Any]]:
    found: dict[str, list[Interval | None]] = {}
    for place, version in enumerate(versions):
        for result in version.evaluation.suites:
            if result.target == version.evaluation.aligned:
                cells = found.setdefault(f"{result.suite}, {result.decoding}", [None] * len(versions))
                cells[place] = share(result)
    return [{"label": name, "cells": cells} for name, cells in found.items()]


def _knowledge(versions: Sequence[Version]) -> list[dict[str, Any]]:
    found: dict[str, list[Interval | None]] = {}
    for place, version in enumerate(versions):
        for task, models in version.evaluation.knowledge.items():
            scores = list(models.values())[-1]
            if len(scores) > 1:
                found.setdefault(task, [None] * len(versions))[place] = mean_interval(scores)
    return [{"label": task, "cells": cells} for task, cells in found.items()]


def _differences(versions: Sequence[Version]) -> list[dict[str, Any]]:
    """Fields of the manifests that are not the same everywhere."""
    fields_of = [flat(version.manifest) for version in versions]
    fields = list(dict.fromkeys(field for one in fields_of for field in one))
    return [
        {"field": field, "cells": [one.get(field, "–") for one in fields_of]}
        for field in fields
        if len({one.get(field) for one in fields_of}) > 1
    ]


def _unit(version: Version) -> str:
    """What stands side by side: prompts, or several answers to each of them."""
    keys = list(version.samples)
    return "prompts" if len(set(map(prompt_of, keys))) == len(keys) else "answers"


def _examples(versions: Sequence[Version]) -> list[dict[str, Any]]:
    """Every common prompt; `kind` says whether the last run is better or worse than the first there."""
    first, last = versions[0], versions[-1]
    keys = [key for key in _common(first, last) if all(key in version.samples for version in versions)]
    samples = {version.name: version.samples for version in versions}
    found = []
    for key in keys:
        before, after = samples[first.name][key], samples[last.name][key]
        old, new = (one.rubric.get("total", one.reward) for one in (before, after))
        kinds = ["changed"] if len({samples[version.name][key].answer for version in versions}) > 1 else []
        if old is not None and new is not None and old != new:
            kinds.append("better" if new > old else "worse")
        answers = [{"name": version.name, "sample": samples[version.name][key]} for version in versions]
        found.append({"prompt": after.prompt, "kind": " ".join(kinds), "answers": answers})
    return found


def _distributions(versions: Sequence[Version]) -> str | None:
    """A violin for every run with rewards of two prompts, as a picture's address; None where there is none."""
    versions = [version for version in versions if len(set(map(prompt_of, version.scores(None)))) > 1]
    scores = [list(version.scores(None).values()) for version in versions]
    if not versions:
        return None
    colour = plots.colours([version.name for version in versions])
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(9.2, 3.4))
        ax = figure.subplots()
        for place, (version, values) in enumerate(zip(versions, scores, strict=True)):
            if len(set(values)) > 1:
                body = ax.violinplot(values, positions=[place], widths=0.8, showextrema=False)
                for patch in body["bodies"]:  # type: ignore[attr-defined]
                    patch.set(facecolor=colour[version.name], alpha=0.4, edgecolor="none")
            mean = version.evaluation.interval(version.evaluation.aligned)
            ax.errorbar(
                place, mean.estimate, [[mean.estimate - mean.low], [mean.high - mean.estimate]], fmt="o",
                color=plots.INK, capsize=4,
            )  # fmt: skip
        ax.set_xticks(range(len(versions)), [version.name for version in versions])
        ax.set(ylabel="reward")
    return plots.as_image(figure)
