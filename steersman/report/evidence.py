"""What a sceptic asks of a run beside its reward: wins, suites, knowledge, licences, over-optimisation.

Every function gives what the template shows; the template only formats.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from steersman.report import overoptimisation
from steersman.report.best_of_n import best_of_n
from steersman.report.schema import Evaluation, JudgeResult, prompt_of
from steersman.report.summary import criteria, knowledge, label
from steersman.report.wins import Duel, matrix
from steersman.statistics import Interval, mean_interval
from steersman.suites.verdicts import share


def evidence(evaluation: Evaluation) -> dict[str, Any]:
    """Sections of the report; what was not measured is empty."""
    watched = evaluation.watched
    return {
        "wins": wins(evaluation),
        "suites": suites(evaluation),
        "sawyer": sawyer(evaluation),
        "knowledge": knowledge(evaluation) if evaluation.knowledge else {},
        "licences": evaluation.licences,
        "best": best(evaluation),
        "watched": watched
        and overoptimisation.summary(watched.looks, watched.planned, watched.false_alarms) | {"looks": watched.looks},
    }


def wins(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A matrix by reward and by every judge."""
    names = list(evaluation.models)
    found = [{"by": "reward", "rows": matrix(evaluation.duels(), names), "judge": None}] if len(names) > 1 else []
    return [one for one in found if one["rows"]] + judged_wins(evaluation.judges, names)


def judged_wins(judged: Mapping[str, JudgeResult], names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A matrix by every judge, with what it cost."""
    found = []
    for name, result in judged.items():
        duels = [Duel(prompt_of(pair.prompt_id), pair.one, pair.other, pair.score) for pair in result.pairs]
        versions = names or list(dict.fromkeys(name for duel in duels for name in (duel.other, duel.one)))
        rows = matrix(duels, versions)
        found.append({"by": f"{name} ({result.model})", "rows": rows, "judge": result})
    return found


def suites(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Every suite: a line for the whole and one for each tag, a cell for each model."""
    names = list(evaluation.models)
    found: dict[tuple[str, str], dict[str, Interval]] = {}
    for result in evaluation.suites:
        for tag in (None, *result.tags):
            found.setdefault((result.suite, tag or ""), {})[result.target] = share(result, tag)
    return [
        {"suite": suite, "tag": tag, "cells": [cells.get(name) for name in names]}
        for (suite, tag), cells in found.items()
    ]


def sawyer(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The table of the SAWYER case study: mean and variance of the reward, and each benchmark, of every model."""
    rows: list[dict[str, Any]] = []
    means: list[Interval | None] = [evaluation.interval(name) for name in evaluation.models]
    rows.append({"label": "reward, mean", "cells": means, "percent": False})
    for scorer in evaluation.scorers:
        cells: list[Interval | None] = [evaluation.interval(name, f"scores.{scorer}") for name in evaluation.models]
        rows.append({"label": f"scorer {label(scorer)}, mean", "cells": cells, "percent": False})
    variances = [_variance(evaluation.scores(name).values()) for name in evaluation.models]
    rows.append({"label": "reward, variance", "numbers": variances})
    for task, models in evaluation.knowledge.items():
        scores = [mean_interval(models[name]) if name in models else None for name in evaluation.models]
        rows.append({"label": task, "cells": scores, "percent": True})
    return rows


def best(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Best-of-n curves of the model before alignment against every scorer that the reward does not know."""
    golds = [f"scores.{name}" for name in evaluation.scorers] + (["total"] if criteria(evaluation) else [])
    curves = ((gold, best_of_n(evaluation, evaluation.start, gold)) for gold in golds)
    return [{"gold": label(gold.removeprefix("scores.")), "curve": curve} for gold, curve in curves if curve]


def _variance(values: Collection[float]) -> float | None:
    return statistics.variance(values) if len(values) > 1 else None
