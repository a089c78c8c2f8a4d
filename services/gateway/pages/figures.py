"""What the operator's page shows, counted in the database: figures and charts of a span of time."""

from __future__ import annotations

import datetime as dt
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from services.gateway.pages.charts import Chart, Mark, largest
from services.gateway.store import Audit
from steersman.store.models import Answer, FeedbackEvent
from steersman.store.units import anomalies, judged_units

ENDED_WELL = ("stop", "length", "tool_calls")
_MOST_ANOMALIES = 20
_SAMPLE = 10_000
"""Latencies are of so many answers, spread evenly, so that the page stays fast."""
_EARLIER = 200
"""Answers before the span of time that say which weights served already."""


@dataclass(frozen=True)
class Span:
    """A span of time up to now, in equal parts that begin at round moments of UTC."""

    name: str
    title: str
    part: dt.timedelta
    parts: int

    def edges(self, now: dt.datetime) -> list[dt.datetime]:
        """Where the parts begin, and the end of the last one, which is not over yet."""
        seconds = self.part.total_seconds()
        end = dt.datetime.fromtimestamp((now.timestamp() // seconds + 1) * seconds, dt.UTC)
        return [end - self.part * back for back in range(self.parts, -1, -1)]

    def times(self, edges: Sequence[dt.datetime]) -> list[str]:
        form = "%H:%M" if self.part * self.parts <= dt.timedelta(days=1) else "%d %b %H:%M"
        return [edge.strftime("%d %b" if self.part >= dt.timedelta(days=1) else form) for edge in edges[:-1]]


SPANS = {
    span.name: span
    for span in (
        Span("1h", "1 hour", dt.timedelta(minutes=2), 30),
        Span("24h", "24 hours", dt.timedelta(hours=1), 24),
        Span("7d", "7 days", dt.timedelta(hours=6), 28),
        Span("30d", "30 days", dt.timedelta(days=1), 30),
        Span("90d", "90 days", dt.timedelta(days=3), 30),
    )
}


def reason(outcome: str) -> str:
    """An outcome in words: the class of an error without its capitals."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", outcome.removesuffix("Error")).replace("_", " ")
    return words.lower() or "unknown"


def operator_figures(session: Session, span: Span, now: dt.datetime) -> dict[str, Any]:
    """Everything that the page prints of the answers, refusals and feedback in a span of time."""
    edges = span.edges(now)
    since, times = edges[0], span.times(edges)
    counts = Counts(edges)
    answered = (Audit.action == "answer", Audit.at >= since)
    part = counts.part(Audit.at)
    ended = session.execute(
        sa.select(
            part, Audit.outcome, sa.func.count(), sa.func.sum(Audit.prompt_tokens), sa.func.sum(Audit.completion_tokens)
        )
        .where(*answered)
        .group_by("part", Audit.outcome)
    ).all()
    count = Audit.records[0]["count"].as_integer()
    refused = session.execute(
        sa.select(part, Audit.outcome, sa.func.sum(sa.func.coalesce(count, 1)))
        .where(Audit.action == "refused", Audit.at >= since)
        .group_by("part", Audit.outcome)
    ).all()
    said = sa.case((FeedbackEvent.kind == "thumbs", FeedbackEvent.value), else_=FeedbackEvent.kind).label("said")
    feedback = session.execute(
        sa.select(counts.part(FeedbackEvent.received_at), said, sa.func.count())
        .where(FeedbackEvent.received_at >= since)
        .group_by("part", "said")
    ).all()
    answers = sum(row[2] for row in ended)
    waited = _waited(session, counts, answered, answers)
    marks = _marks(session, counts, answered, edges)
    failed = [row for row in ended if row[1] not in ENDED_WELL]
    prompt, written = ([(row[0], name, row[at]) for row in ended] for name, at in (("prompt", 3), ("answer", 4)))
    charts = [
        Chart("Traffic", "answers", "bars", times, counts.sums((at, "answers", n) for at, _, n, *_ in ended)),
        Chart("Latency", "milliseconds", "lines", times, waited["series"]),
        Chart("Tokens", "tokens", "bars", times, counts.sums([*prompt, *written])),
        Chart("Feedback", "judgements", "bars", times, largest(counts.sums(feedback))),
        Chart("Refusals", "requests", "bars", times, largest(counts.sums((at, reason(o), n) for at, o, n in refused))),
        Chart("Errors", "answers", "bars", times, largest(counts.sums((at, reason(o), n) for at, o, n, *_ in failed))),
    ]
    return {
        "answers": answers,
        "prompt_tokens": sum(row[3] for row in ended),
        "completion_tokens": sum(row[4] for row in ended),
        "first_token": waited["first_token"],
        "duration": waited["duration"],
        "charts": charts,
        "marks": marks,
        "outcomes": sorted(_totals((o, n) for _, o, n, *_ in ended), key=lambda item: -item[1]),
        "refusals": sorted(_totals((o, n) for _, o, n in refused), key=lambda item: -item[1]),
        "tenants": _tenants(session, answered),
        **_judged(session, since),
    }


class Counts:
    """Rows of (part, name, number) as one list for every name."""

    def __init__(self, edges: Sequence[dt.datetime]) -> None:
        self._edges = edges
        self.parts = len(edges) - 1

    def part(self, column: Any) -> sa.Label[int]:
        """Which part of the span a moment is in, in SQL: the same in every database."""
        ends = self._edges[1:-1]
        return sa.case(*((column < end, at) for at, end in enumerate(ends)), else_=len(ends)).label("part")

    def sums(self, rows: Iterable[Any]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for at, name, number in rows:
            found.setdefault(name, [0.0] * self.parts)[at] += number or 0
        return found

    def place(self, moment: dt.datetime) -> float:
        """Where a moment lies between the ends, from 0 to 1."""
        return (moment - self._edges[0]) / (self._edges[-1] - self._edges[0])


def _totals(rows: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    found: dict[str, int] = defaultdict(int)
    for name, n in rows:
        found[name] += n
    return list(found.items())


def _waited(session: Session, counts: Counts, answered: tuple[Any, ...], answers: int) -> dict[str, Any]:
    """How long answers took: in all, and the p50 and p95 of every part."""
    every = -(-answers // _SAMPLE) or 1
    rows = session.execute(
        sa.select(counts.part(Audit.at), Audit.first_token_milliseconds, Audit.milliseconds).where(
            *answered, Audit.outcome.in_(ENDED_WELL), Audit.id % every == 0
        )
    ).all()
    parts: dict[int, list[int]] = defaultdict(list)
    for at, _, milliseconds in rows:
        parts[at].append(milliseconds)
    quantiles = [_quantiles(parts.get(at, [])) for at in range(counts.parts)]
    return {
        "first_token": _quantiles([row[1] for row in rows if row[1]]),
        "duration": _quantiles([row[2] for row in rows]),
        "series": {name: [found.get(name) for found in quantiles] for name in ("p50", "p95")} if rows else {},
    }


def _quantiles(values: list[int]) -> dict[str, int]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {name: ordered[min(int(len(ordered) * q), len(ordered) - 1)] for name, q in (("p50", 0.5), ("p95", 0.95))}


def _marks(session: Session, counts: Counts, answered: tuple[Any, ...], edges: Sequence[dt.datetime]) -> list[Mark]:
    """The moments at which weights began to serve: their first answer after a part of the span without them.

    Weights that were taken back and served again are marked again.
    """
    earlier = (
        sa.select(Audit.weights_version)
        .where(Audit.action == "answer", Audit.at < edges[0])
        .order_by(Audit.at.desc())
        .limit(_EARLIER)
    )
    serving = set(session.scalars(earlier))
    rows = session.execute(
        sa.select(counts.part(Audit.at), Audit.weights_version, sa.func.min(Audit.at))
        .where(*answered, Audit.weights_version != "")
        .group_by("part", Audit.weights_version)
        .order_by("part", sa.func.min(Audit.at))
    ).all()
    parts: dict[int, dict[str, dt.datetime]] = defaultdict(dict)
    for at, version, first in rows:
        parts[at][version] = first
    found: list[Mark] = []
    for at in sorted(parts):
        for version, first in parts[at].items():
            if version not in serving:
                found.append(Mark(len(found) + 1, counts.place(first), f"{version} from {first:%d %b %H:%M}"))
        serving = set(parts[at])
    return found


def _tenants(session: Session, answered: tuple[Any, ...]) -> Sequence[Any]:
    return session.execute(
        sa.select(Audit.tenant, sa.func.count(), sa.func.sum(Audit.prompt_tokens + Audit.completion_tokens))
        .where(*answered)
        .group_by(Audit.tenant)
        .order_by(sa.func.count().desc())
        .limit(20)
    ).all()


def _judged(session: Session, since: dt.datetime) -> dict[str, Any]:
    """Versions with what people said of their answers."""
    versions = _versions(session, since)
    deployments = sorted({row["deployment"] for row in versions})
    if not deployments:
        return {"versions": versions, "judged": [], "anomalies": []}
    return {
        "versions": versions,
        "judged": sorted(judged_units(session, deployments, since).items()),
        "anomalies": anomalies(session, deployments, since)[:_MOST_ANOMALIES],
    }


def _versions(session: Session, since: dt.datetime) -> list[dict[str, Any]]:
    """Answers and feedback by deployment and weights version."""
    # Not the bare column: to group by it SQLite would walk its index, over all answers, rather than that of the time.
    named = sa.func.coalesce(Answer.deployment, sa.literal_column("''"))
    given = session.execute(
        sa.select(named.label("deployment"), Answer.weights_version, sa.func.count())
        .where(Answer.created_at >= since)
        .group_by(named, Answer.weights_version)
        .order_by(Answer.weights_version.desc())
    ).all()
    said: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for deployment, version, kind, value, n in session.execute(
        sa.select(
            Answer.deployment,
            Answer.weights_version,
            FeedbackEvent.kind,
            sa.case((FeedbackEvent.kind == "edit", ""), else_=FeedbackEvent.value).label("said"),
            sa.func.count(),
        )
        .join(FeedbackEvent, FeedbackEvent.answer_id == Answer.id)
        .where(Answer.created_at >= since, FeedbackEvent.current, FeedbackEvent.received_at >= since)
        .group_by(Answer.deployment, Answer.weights_version, FeedbackEvent.kind, sa.literal_column("said"))
    ):
        said[deployment, version][f"{kind} {value}".strip()] = n
    return [
        {"deployment": deployment, "version": version, "answers": n, "feedback": said[deployment, version]}
        for deployment, version, n in given
    ]
