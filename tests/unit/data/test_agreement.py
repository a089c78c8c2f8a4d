"""Agreement statistics against published and computed figures."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats import inter_rater

from steersman.data.agreement import (
    AgreementReport,
    Thresholds,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    order_bias,
    patterns_of,
    raw_agreement,
)

LEVELS = ("nominal", "ordinal", "interval", "ratio")


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "agreement" / "expected.json").read_text())


def table(path: Path) -> list[list[float | None]]:
    with open(path, newline="") as file:
        return [[float(cell) if cell else None for cell in row[1:]] for row in list(csv.reader(file))[1:]]


def test_fleiss_kappa_of_the_wikipedia_table(shared_data: Path, expected: dict[str, Any]) -> None:
    counts = table(shared_data / "agreement" / "fleiss_wikipedia_counts.csv")
    ratings = [[category for category, n in enumerate(row) for _ in range(int(n or 0))] for row in counts]
    kappa, units, votes = fleiss_kappa(patterns_of(ratings))
    wanted = expected["fleiss_wikipedia_counts.csv"]
    assert (units, votes) == (10, 14)
    assert kappa == pytest.approx(wanted["fleiss_kappa"], abs=1e-6)
    assert round(kappa, 2) == wanted["published_fleiss_kappa"]


def test_fleiss_kappa_of_fleiss_1971(shared_data: Path, expected: dict[str, Any]) -> None:
    kappa, units, votes = fleiss_kappa(
        patterns_of(table(shared_data / "agreement" / "fleiss1971_diagnoses_ratings.csv"))
    )
    wanted = expected["fleiss1971_diagnoses_ratings.csv"]
    assert (units, votes) == (30, 6)
    assert kappa == pytest.approx(wanted["fleiss_kappa"], abs=1e-6)
    assert round(kappa, 2) == wanted["published_fleiss_kappa"]


@pytest.mark.parametrize("level", LEVELS)
def test_alpha_of_krippendorff_2011(shared_data: Path, expected: dict[str, Any], level: Any) -> None:
    wanted = expected["krippendorff2011_4raters.csv"]
    ratings = table(shared_data / "agreement" / "krippendorff2011_4raters.csv")
    alpha = krippendorff_alpha(patterns_of(ratings), level)
    assert alpha == pytest.approx(wanted["alpha"][level], abs=1e-6)
    assert round(alpha, 3) == wanted["published_alpha"][level]


def test_three_raters_of_2500_summaries_with_missing_votes(shared_data: Path, expected: dict[str, Any]) -> None:
    wanted = expected["../xsum-annotations/factuality_annotations_xsum_summaries.csv"]
    items: dict[tuple[str, str], list[float | None]] = defaultdict(list)
    path = shared_data / "xsum-annotations" / "factuality_annotations_xsum_summaries.csv"
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            value = {"yes": 1.0, "no": 0.0, "NULL": None}[row["is_factual"]]
            items[row["bbcid"], row["system"]].append(value)
    patterns = patterns_of(items.values())
    kappa, units, votes = fleiss_kappa(patterns)
    assert (len(items), units, votes) == (wanted["items"], wanted["items_with_3_valid_ratings"], 3)
    assert kappa == pytest.approx(wanted["fleiss_kappa_complete_items"], abs=1e-6)
    assert krippendorff_alpha(patterns, "nominal") == pytest.approx(wanted["alpha_nominal_all"], abs=1e-6)


ratings_tables = st.lists(
    st.lists(st.one_of(st.none(), st.integers(1, 4).map(float)), min_size=3, max_size=3), min_size=2, max_size=25
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ratings_tables, st.sampled_from(LEVELS))
def test_alpha_from_patterns_is_alpha_of_the_table(ratings: list[list[float | None]], level: Any) -> None:
    alpha = krippendorff_alpha(patterns_of(ratings), level)
    kept = [row for row in ratings if sum(value is not None for value in row) > 1]
    values = {value for row in kept for value in row if value is not None}
    if len(values) < 2:
        assert alpha is None
        return
    matrix = np.array([[np.nan if value is None else value for value in row] for row in kept]).T
    assert alpha == pytest.approx(krippendorff.alpha(matrix, level_of_measurement=level), abs=1e-9)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40), st.booleans())
def test_cohen_kappa_is_scikit_learns(pairs: list[tuple[int, int]], weighted: bool) -> None:
    confusion: dict[tuple[float, float], int] = defaultdict(int)
    for pair in pairs:
        confusion[pair] += 1
    domain = sorted({value for pair in pairs for value in pair})
    kappa = cohen_kappa(confusion, weighted=weighted)
    if kappa is None:
        assert len(domain) == 1
        return
    # Linear weights count distances between ranks, so both must see the same, gapless, categories.
    first, second = zip(*[(domain.index(one), domain.index(two)) for one, two in pairs], strict=True)
    wanted = cohen_kappa_score(first, second, weights="linear" if weighted else None)
    assert kappa == pytest.approx(wanted, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=30))
def test_fleiss_kappa_is_that_of_statsmodels(ratings: list[list[int]]) -> None:
    kappa, units, votes = fleiss_kappa(patterns_of(ratings))
    assert (units, votes) == (len(ratings), 3)
    if len({value for row in ratings for value in row}) < 2:
        assert kappa is None
        return
    assert kappa == pytest.approx(inter_rater.fleiss_kappa(inter_rater.aggregate_raters(ratings)[0]), abs=1e-9)


def test_raw_agreement_counts_pairs() -> None:
    assert raw_agreement(patterns_of([[1, 1, 2], [1, 1, 1], [2, None, None]])) == (6, 4)


def test_order_bias_names_share_and_p_value() -> None:
    share, p_value = order_bias(100, 70)
    assert share == pytest.approx(0.7)
    assert p_value < 0.001
    for decided, first in ((1, 0), (2, 1), (7, 5), (100, 70), (5000, 2450)):
        assert order_bias(decided, first)[1] == pytest.approx(binomtest(first, decided).pvalue, rel=1e-9)
    assert order_bias(0, 0) == (None, None)


def report(**changes: Any) -> AgreementReport:
    values: dict[str, Any] = {
        "project": "p", "judgements": 60, "honeypots": 10, "honeypot_accuracy": 0.7, "first_share": 0.64,
        "first_p_value": 0.02, "labelers": [], "pairs": [], "days": [],
        "questions": [
            {"question": "preference", "units": 20, "pairs": 60, "raw": 0.6, "alpha": 0.31, "level": "nominal",
             "fleiss": 0.30, "fleiss_units": 20, "fleiss_votes": 3}
        ],
    }  # fmt: skip
    return AgreementReport.model_validate(values | changes)


def test_thresholds_name_both_numbers() -> None:
    thresholds = Thresholds(
        min_alpha=0.6, min_fleiss=0.2, min_raw_agreement=0.7, min_honeypot_accuracy=0.8, max_order_bias=0.1,
        min_judgements=100,
    )  # fmt: skip
    assert report().failures(thresholds) == [
        "preference: alpha is 0.310, at least 0.6 is asked",
        "preference: raw agreement is 0.600, at least 0.7 is asked",
        "honeypot accuracy is 0.700, at least 0.8 is asked",
        "the answer shown first wins 0.640 of the comparisons, 0.4 to 0.6 is asked",
        "60 judgements, at least 100 are asked",
    ]
    assert report().failures(Thresholds()) == []


def test_unknown_agreement_blocks_but_unanimity_does_not() -> None:
    thresholds = Thresholds(min_alpha=0.6, min_honeypot_accuracy=0.5)
    assert report(questions=[], honeypot_accuracy=None).failures(thresholds) == [
        "no item has two votes, so agreement is unknown",
        "honeypot accuracy is not defined, at least 0.5 is asked",
    ]
    question = report().questions[0].model_copy(update={"alpha": None, "fleiss": None, "raw": 1.0})
    assert report(questions=[question]).failures(Thresholds(min_alpha=0.6)) == []
