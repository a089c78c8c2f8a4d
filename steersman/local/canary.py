"""Champion and candidate side by side on one machine: the gateway splits, this watches and decides.

As the controller does in a cluster, with the same tests (`steersman/canary.py`): the candidate gets its share of the
conversations, is taken back when something speaks against it, gets all of them when harm is excluded, and waits
otherwise. What was weighed is kept in a file, so that serving again goes on where it stopped.
"""

from __future__ import annotations

import datetime as dt
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.request import urlopen

import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from steersman.artifacts import write_whole
from steersman.canary import OUR_FAULT, Arm, Buckets, Evidence, arm_of, decide, median, weigh
from steersman.config.base import FrozenModel
from steersman.config.manifest import Canary
from steersman.errors import SteersmanError
from steersman.store.engine import Store
from steersman.store.units import judged_units

LOOK_SECONDS = 5.0
CHAMPION = "champion"
_COUNTED = ("requests", "errors", "timed", "slow")
_ANSWERS = "steersman_gateway_variant_answers"
_SECONDS = "steersman_gateway_variant_answer_seconds"


class State(FrozenModel):
    """What is kept between two servings."""

    champion: str
    """Folder of the champion's model."""
    candidate: str
    """Folder of the candidate's model."""
    name: str
    """What the candidate's answers are stored under."""
    since: str
    """When both served for the first time (ISO 8601); judgements count from here."""
    before: tuple[Arm, Arm] = (Arm(), Arm())
    """What earlier gateways counted, which begin at 0 each."""
    evidence: Evidence = Evidence()
    """What has been weighed."""
    decision: Literal["Promoted", "RolledBack"] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Counted:
    """What the gateway counted of one variant since it started."""

    requests: float
    errors: float
    times: Buckets


def read_metrics(page: str, variant: str) -> Counted:
    """One variant's figures on a page of metrics."""
    outcomes: dict[str, float] = defaultdict(float)
    buckets: dict[float, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.labels.get("variant") != variant:
                continue
            if sample.name == f"{_ANSWERS}_total":
                outcomes[sample.labels["outcome"]] += sample.value
            elif sample.name == f"{_SECONDS}_bucket":
                buckets[float(sample.labels["le"])] = sample.value
    failed = sum(count for outcome, count in outcomes.items() if outcome in OUR_FAULT)
    return Counted(sum(outcomes.values()), failed, sorted(buckets.items()))


class SideBySide:
    """The shares of two models, and when they change."""

    def __init__(
        self,
        folder: Path,
        models: tuple[Path, Path],
        endpoint: str,
        percent: int,
        limits: Canary,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        """Args:
        folder: for `split.yaml`, which the gateway reads, and `canary.json`, what was weighed.
        models: folders of champion and candidate.
        endpoint: the candidate's policy service.
        percent: its share of the conversations.
        """
        self.split = folder / "split.yaml"
        self._kept = folder / "canary.json"
        self._endpoint = endpoint
        self._percent = percent
        self._limits = limits
        self.state = self._restore(models, now())
        self._share()

    def _restore(self, models: tuple[Path, Path], now: dt.datetime) -> State:
        champion, candidate = (str(model) for model in models)
        try:
            kept = State.model_validate_json(self._kept.read_bytes(), by_alias=True, by_name=False)
        except (OSError, ValidationError):
            kept = None
        if kept is None or (kept.champion, kept.candidate) != (champion, candidate):
            name = f"candidate-{now:%Y%m%d%H%M%S}"
            return State(champion=champion, candidate=candidate, name=name, since=now.isoformat())
        return kept.model_copy(update={"before": (kept.evidence.champion, kept.evidence.candidate)})

    def _share(self) -> None:
        """Writes what the gateway obeys, and what is kept."""
        percent = {None: self._percent, "Promoted": 100, "RolledBack": 0}[self.state.decision]
        entry = {"name": self.state.name, "percent": percent, "endpoints": [self._endpoint]}
        shares = {"champion": {"name": CHAMPION}, **({"candidate": entry} if percent else {})}
        write_whole(self.split, yaml.safe_dump(shares, sort_keys=False))
        write_whole(self._kept, json.dumps(self.state.model_dump(mode="json", by_alias=True), indent=2))

    def look(self, database: str, metrics_url: str) -> str | None:
        """Weighs what has happened since the last look.

        Returns:
            What to tell people; None: nothing new.

        Raises:
            SteersmanError, OSError, SQLAlchemyError: a source does not answer; nothing is decided.
        """
        if self.state.decision is not None:
            return None
        with urlopen(metrics_url, timeout=10) as response:
            page = response.read().decode()
        variants = (CHAMPION, self.state.name)
        store = Store.open(database, migrate=False)
        try:
            with store.reading() as session:
                judged = judged_units(session, variants, dt.datetime.fromisoformat(self.state.since))
        finally:
            store.close()
        counted = [read_metrics(page, variant) for variant in variants]
        usual = median(counted[0].times)
        limit = None if usual is None else usual * self._limits.max_latency_ratio
        arms = []
        for variant, numbers, before in zip(variants, counted, self.state.before, strict=True):
            now = arm_of(0, 0, numbers.requests, numbers.errors, numbers.times, limit)
            total = {name: getattr(before, name) + getattr(now, name) for name in _COUNTED}
            arms.append(Arm(judged=judged[variant].judged, bad=judged[variant].bad, **total))
        return self.weigh(arms[0], arms[1])

    def weigh(self, champion: Arm, candidate: Arm) -> str | None:
        """Decides by counts since the beginning; what to tell people, None: nothing new."""
        evidence = weigh(self.state.evidence, champion, candidate, self._limits)
        if evidence == self.state.evidence:
            return None
        verdict = decide(evidence, self._limits)
        told = f"candidate: {candidate.judged:.0f} judged, {candidate.bad:.0f} with a thumb down; champion: "
        told += f"{champion.judged:.0f} and {champion.bad:.0f}"
        decided: Mapping[str, object] = {}
        if verdict.against is not None:
            decided = {"decision": "RolledBack", "reason": verdict.against}
            told = f"the candidate is taken back: {verdict.against}"
        elif verdict.harmless and candidate.judged >= self._limits.min_feedback:
            decided = {"decision": "Promoted", "reason": "the harm is excluded"}
            told = f"the candidate gets all conversations; serve it from now on: {self.state.candidate}"
        old = self.state.evidence
        self.state = self.state.model_copy(update={"evidence": evidence, **decided})
        self._share()
        judged = old.candidate.judged, old.champion.judged
        return told if decided or judged != (candidate.judged, champion.judged) else None


UNREADABLE = (SteersmanError, OSError, SQLAlchemyError, ValueError)
"""What a look raises while a source does not answer."""
