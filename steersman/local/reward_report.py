"""`steersman eval-reward`: a reward model on benchmarks, on comparisons, and against the people of a project."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from steersman.data.records import Preference, numbered_rows, plain_messages
from steersman.errors import DataError, InvalidArgumentError
from steersman.report.reward_bench import Scored, read_questions, report
from steersman.report.schema import PairScore, RewardModelEvaluation
from steersman.statistics import wilson_interval

Scorer = Callable[[Sequence[Sequence[dict[str, Any]]]], list[float | None]]
"""Conversations that end with the answer -> rewards, in order; None of one that is longer than the model takes."""


class Said(NamedTuple):
    """A labeler's verdict on one pair of answers."""

    pair: tuple[int, int, int]
    """Item and the places of its two answers."""
    labeler: str
    score: float
    """1: the first is better, 0: the second, 0.5: a tie."""


def open_scorer(folder: Path) -> Scorer:
    """The reward model of a folder on this machine."""
    from steersman.nn.hardware import pick_device
    from steersman.nn.load import load_reward_model

    model = load_reward_model(folder, device=pick_device("auto"))

    def encoded(conversation: Sequence[dict[str, Any]]) -> list[int] | None:
        try:
            return model.encode(list(conversation))
        except InvalidArgumentError:
            return None

    def score(conversations: Sequence[Sequence[dict[str, Any]]]) -> list[float | None]:
        rows = [encoded(one) for one in conversations]
        rewards = iter(model.score([row for row in rows if row is not None]).reward.tolist())
        return [None if row is None else next(rewards) for row in rows]

    return score


def on_benchmark(score: Scorer, path: Path) -> dict[str, Any]:
    """RewardBench or RewardBench 2; `left_out`: rows with an answer that is longer than the model takes."""
    questions = read_questions(path)
    rewards = iter(score([_ends_with(one.prompt, text) for one in questions for text in (*one.right, *one.wrong)]))
    found = []
    for one in questions:
        right, wrong = ([next(rewards) for _ in side] for side in (one.right, one.wrong))
        kept = [[value for value in side if value is not None] for side in (right, wrong)]
        if kept == [right, wrong]:
            found.append(Scored(one, tuple(kept[0]), tuple(kept[1])))
    _must_have(found, path)
    return report(found) | {"left_out": len(questions) - len(found)}


def on_pairs(score: Scorer, path: Path) -> dict[str, Any]:
    """Accuracy with its interval, calibration, and what length alone explains, on comparisons that people judged;
    `left_out`: those with an answer that is longer than the model takes."""
    asked = [row for _, row in numbered_rows(path, Preference) if row.soft_label != 0.5]  # a tie has no right side
    sides = [[plain_messages(row.prompt) + plain_messages(getattr(row, side)) for row in asked] for side in _SIDES]
    both = list(zip(*(score(side) for side in sides), *sides, strict=True))
    rows = [(one, other, *texts) for one, other, *texts in both if one is not None and other is not None]
    _must_have(rows, path)
    chosen, rejected = [row[0] for row in rows], [row[1] for row in rows]
    lengths = [[len(str(row[place][-1]["content"] or "")) for row in rows] for place in (2, 3)]
    longer = sum(_win(one - other) for one, other in zip(*lengths, strict=True)) / len(rows)
    found = RewardModelEvaluation(
        pairs=tuple(PairScore(chosen=one, rejected=other) for one, other in zip(chosen, rejected, strict=True)),
        longer_wins=longer,
        shorter_wins=1.0 - longer,
    )
    # Where people preferred the shorter answer, a model that likes length is wrong.
    by_length: dict[str, list[float]] = {"longer": [], "shorter": []}
    for one, other, long, short in zip(chosen, rejected, *lengths, strict=True):
        if long != short:
            by_length["longer" if long > short else "shorter"].append(_win(one - other))
    return {
        "pairs": len(rows),
        "left_out": len(asked) - len(rows),
        "accuracy": list(wilson_interval(found.accuracy * len(rows), len(rows))),
        "calibration_error": found.calibration_error if len(rows) > 1 else None,
        "length_baseline": found.length_baseline,
        "accuracy_where_people_prefer_the": {
            name: list(wilson_interval(sum(values), len(values))) for name, values in by_length.items() if values
        },
    }


def against_labelers(verdicts: Iterable[Said], rewards: dict[tuple[int, int], float]) -> dict[str, Any]:
    """How often the model shares each labeler's preferences, beside how often the other labelers do.

    Args:
        rewards: of every item's answers, by item and place.
    """
    by_pair: dict[tuple[int, int, int], dict[str, float]] = defaultdict(dict)
    for said in verdicts:
        by_pair[said.pair][said.labeler] = said.score
    model: dict[str, list[float]] = defaultdict(list)
    others: dict[str, list[float]] = defaultdict(list)
    for (item, first, second), scores in by_pair.items():
        one, other = rewards.get((item, first), math.nan), rewards.get((item, second), math.nan)
        for labeler, said_score in scores.items():
            if said_score == 0.5:
                continue  # a tie prefers neither
            if math.isfinite(one) and math.isfinite(other):
                model[labeler].append(_shares(_win(one - other), said_score))
            others[labeler] += [_shares(score, said_score) for name, score in scores.items() if name != labeler]
    labelers = {
        name: {
            "model": list(wilson_interval(sum(model[name]), len(model[name]))) if model[name] else None,
            "other_labelers": list(wilson_interval(sum(others[name]), len(others[name]))) if others[name] else None,
            "comparisons": len(model[name]),
        }
        for name in sorted({*model, *others})
    }
    all_model, all_others = ([value for values in by.values() for value in values] for by in (model, others))
    return {
        "model": list(wilson_interval(sum(all_model), len(all_model))) if all_model else None,
        "labelers_with_each_other": list(wilson_interval(sum(all_others), len(all_others))) if all_others else None,
        "labelers": labelers,
    }


def pairs_of(item: int, labeler: str, ranking: Sequence[Sequence[int]]) -> list[Said]:
    """Every two answers of a verdict's ranking."""
    place = {index: rank for rank, group in enumerate(ranking) for index in group}
    return [
        Said((item, one, other), labeler, 0.5 if place[one] == place[other] else float(place[one] < place[other]))
        for one, other in combinations(sorted(place), 2)
    ]


_SIDES = ("chosen", "rejected")


def _must_have(rows: Sequence[object], path: Path) -> None:
    if not rows:
        raise DataError(
            f"{path}: no row can be scored: there is none, or all are longer than the reward model takes; use one that "
            "was trained on longer conversations"
        )


def _ends_with(prompt: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _win(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _shares(score: float, other: float) -> float:
    """Of two verdicts, a tie shares half of a preference."""
    return 0.5 if score == 0.5 else float(score == other)
