"""How good a reward model is on comparisons it was not trained on, beside what the answers' length alone predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steersman.report.schema import PairScore, RewardModelEvaluation
from steersman.statistics import calibration_bins, expected_calibration_error, wilson_interval

_MARGIN_GROUPS = 6


@dataclass(frozen=True)
class ScoredPair:
    chosen: float
    """Normalised reward."""
    rejected: float
    raw_difference: float
    """Chosen minus rejected in the unit of the loss, whose sigmoid is the predicted probability."""
    chosen_length: int
    """Tokens of the answer."""
    rejected_length: int
    margin: float | None = None


def evaluate_pairs(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """The content of `evaluation.json`.

    `pairs`, `longer_wins` and `shorter_wins` as the report reads them; `accuracy` [share, low, high] with Wilson's 95%
    interval, ties count half; `by_margin` the same for each margin (or quarter of the margins where they are many);
    `calibration` of sigmoid(raw difference) in bins; `length_correlation` of reward and answer length.
    """
    right = np.array([_win(pair.chosen - pair.rejected) for pair in pairs])
    longer = float(np.mean([_win(pair.chosen_length - pair.rejected_length) for pair in pairs]))
    report = RewardModelEvaluation(
        pairs=tuple(PairScore(chosen=p.chosen, rejected=p.rejected, margin=p.margin) for p in pairs),
        longer_wins=longer,
        shorter_wins=1.0 - longer,
    )
    rewards = np.array([[pair.chosen, pair.rejected] for pair in pairs])
    lengths = np.array([[pair.chosen_length, pair.rejected_length] for pair in pairs], dtype=float)
    result = {
        "accuracy": list(wilson_interval(float(right.sum()), len(right))),
        "length_correlation": _correlation(rewards.ravel(), lengths.ravel()),
        "by_margin": _by_margin([pair.margin for pair in pairs], right),
        **report.model_dump(mode="json"),
    }
    if len(pairs) > 1:
        # Each pair as the model leans: probability at least one half, right or wrong.
        confidence = [1.0 / (1.0 + math.exp(-abs(pair.raw_difference))) for pair in pairs]
        bins = calibration_bins(confidence, right.tolist())
        result["calibration_error"] = expected_calibration_error(bins)
        result["calibration"] = [
            {"predicted": part.predicted, "observed": list(part.observed), "size": part.size} for part in bins
        ]
    return result


def evaluate_ratings(predicted: np.ndarray, rated: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Per aspect: number of ratings, root mean square error and correlation; [N, A] arrays, NaN where not rated."""
    result = {}
    for column, name in enumerate(names):
        exists = ~np.isnan(rated[:, column])
        error = predicted[exists, column] - rated[exists, column]
        result[name] = {
            "ratings": int(exists.sum()),
            "rmse": float(np.sqrt(np.mean(error**2))) if exists.any() else None,
            "correlation": _correlation(predicted[exists, column], rated[exists, column]),
        }
    return result


def _win(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _by_margin(margins: Sequence[float | None], right: np.ndarray) -> list[dict[str, Any]]:
    known = np.array([np.nan if margin is None else margin for margin in margins], dtype=float)
    values = np.unique(known[~np.isnan(known)])
    if len(values) > _MARGIN_GROUPS:
        values = np.unique(np.quantile(known[~np.isnan(known)], [0, 0.25, 0.5, 0.75]))
    groups = np.searchsorted(values, known, side="right") - 1
    return [
        {
            "margin_from": float(value),
            "accuracy": list(wilson_interval(float(right[groups == number].sum()), int((groups == number).sum()))),
            "pairs": int((groups == number).sum()),
        }
        for number, value in enumerate(values)
        if (groups[~np.isnan(known)] == number).any()
    ]


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's; None where it is not defined."""
    if len(one) < 2 or one.std() == 0 or other.std() == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
