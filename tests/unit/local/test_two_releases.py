"""Champion and candidate on one machine: what is written for the gateway, and when the candidate wins or goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from services.gateway.backends.split import Shares
from services.gateway.metrics import Metrics
from steersman.canary import Arm
from steersman.config.manifest import Canary
from steersman.local.canary import SideBySide, read_metrics


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "old", tmp_path / "new"


def begin(tmp_path: Path, models: tuple[Path, Path]) -> SideBySide:
    return SideBySide(tmp_path, models, "127.0.0.1:7", 50, Canary())


def shares(canary: SideBySide) -> Shares:
    return Shares.model_validate(yaml.safe_load(canary.split.read_text()))


def test_the_gateway_can_read_what_is_written(tmp_path, models):
    candidate = shares(begin(tmp_path, models)).candidate
    assert candidate is not None
    assert (candidate.percent, candidate.endpoints) == (50, ["127.0.0.1:7"])


def test_a_worse_candidate_goes_and_an_equal_one_gets_everything_in_the_end(tmp_path, models):
    canary = begin(tmp_path, models)
    assert canary.weigh(Arm(judged=20, bad=4), Arm(judged=20, bad=5)) is not None
    assert canary.weigh(Arm(judged=20, bad=4), Arm(judged=20, bad=5)) is None, "nothing new"
    told = canary.weigh(Arm(judged=600, bad=60), Arm(judged=600, bad=180))
    assert "taken back: thumbs down in 30.0% of 600" in str(told)
    assert shares(canary).candidate is None
    assert canary.state.decision == "RolledBack"

    other = SideBySide(tmp_path / "", (models[0], tmp_path / "newer"), "127.0.0.1:7", 50, Canary())
    assert other.state.decision is None, "another candidate begins anew"
    for judged in range(100, 3000, 100):
        other.weigh(Arm(judged=judged, bad=judged / 5), Arm(judged=judged, bad=judged / 5))
    assert other.state.decision == "Promoted"
    promoted = shares(other).candidate
    assert promoted is not None
    assert promoted.percent == 100


def test_serving_again_goes_on_where_it_stopped(tmp_path, models):
    first = begin(tmp_path, models)
    seen = Arm(judged=300, bad=50, requests=900, errors=1)
    first.weigh(seen, seen)
    again = begin(tmp_path, models)
    assert again.state.evidence == first.state.evidence
    assert again.state.name == first.state.name
    assert again.state.before == (seen, seen), "a new gateway counts from 0"


def test_figures_come_from_the_gateways_page():
    metrics = Metrics("m")
    for outcome in ("stop", "stop", "InternalError", "BadRequestError"):
        metrics.variant_answers.labels(outcome, "champion").inc()
    metrics.variant_answers.labels("stop", "other").inc()
    for seconds in (0.04, 0.2, 0.3, 4.0):
        metrics.variant_duration.labels("champion").observe(seconds)
    counted = read_metrics(metrics.render().decode(), "champion")
    assert (counted.requests, counted.errors) == (4, 1)
    assert counted.times[-1] == (float("inf"), 4.0)
    assert dict(counted.times)[0.25] == 2.0
