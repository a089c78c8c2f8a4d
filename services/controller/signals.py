"""Live signals of the two variants of a bot: errors and latency from Prometheus, judgements from the store.

Judgements are counted where the answer was given, not where the judgement arrived: the store keeps the deployment of
every answer, and a load balancer may send a thumb to either variant. One conversation or customer counts once.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx
from sqlalchemy.exc import SQLAlchemyError

from services.controller.endpoint import Endpoint, Variant
from services.controller.model import Signals
from steersman.canary import OUR_FAULT, Buckets, arm_of, median
from steersman.errors import SteersmanError, UnavailableError
from steersman.store.engine import Store
from steersman.store.units import Units, judged_units

READ_SECONDS = 20.0
"""Longest time for all signals of one look."""

QUERIES: Mapping[str, str] = {
    "requests": "sum(increase({family}s_total{{{series}}}[{window}s]))",
    "errors": 'sum(increase({family}s_total{{{series},outcome=~"' + "|".join(OUR_FAULT) + '"}}[{window}s]))',
    "seconds": "sum by (le) (increase({family}_seconds_bucket{{{series}}}[{window}s]))",
}


def query(kind: str, namespace: str, variant: Variant, seconds: float) -> str:
    """PromQL over one variant since `seconds` ago."""
    matchers = f'namespace="{namespace}",{variant.series}'
    return QUERIES[kind].format(family=variant.family, series=matchers, window=max(60, math.ceil(seconds)))


@dataclass(frozen=True)
class Measured:
    """What Prometheus knows of one variant."""

    requests: float
    errors: float
    times: Buckets


class LiveSignals:
    """Reads both sources."""

    def __init__(
        self, prometheus_url: str, database_url: str, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """`transport`: how Prometheus is reached; None: over the network."""
        self._http = httpx.AsyncClient(base_url=prometheus_url, timeout=10.0, transport=transport)
        self._store = Store.open(database_url, migrate=False)

    async def read(
        self, endpoint: Endpoint, namespace: str, candidate: str, ratio: float, since: datetime, now: datetime
    ) -> Signals:
        """What champion and candidate did since a time.

        Args:
            ratio: an answer is slow that took longer than this many times the champion's median.

        Raises:
            UnavailableError: a source does not answer in time, refuses, or says what cannot be understood.
        """
        variants = endpoint.variants(candidate)
        seconds = (now - since).total_seconds()
        try:
            async with asyncio.timeout(READ_SECONDS):
                judged, *measured = await asyncio.gather(
                    asyncio.to_thread(self._judged, [variant.deployment for variant in variants], since),
                    self._measured(namespace, variants[0], seconds),
                    self._measured(namespace, variants[1], seconds),
                )
        except TimeoutError:
            raise UnavailableError(f"live signals: no answer within {READ_SECONDS:g} s") from None
        usual = median(measured[0].times)
        limit = None if usual is None else usual * ratio
        champion, challenger = (
            arm_of(units.judged, units.bad, numbers.requests, numbers.errors, numbers.times, limit)
            for units, numbers in zip((judged[variant.deployment] for variant in variants), measured, strict=True)
        )
        return Signals(champion, challenger)

    async def _measured(self, namespace: str, variant: Variant, seconds: float) -> Measured:
        requests, errors, series = await asyncio.gather(
            *(self._ask(query(kind, namespace, variant, seconds)) for kind in QUERIES)
        )
        buckets = sorted((float(labels.get("le", "nan")), count) for labels, count in series)
        # Extrapolation and scrapes in between may make a bucket smaller than the one before it.
        counts = itertools.accumulate((count for _, count in buckets), max)
        times = list(zip((edge for edge, _ in buckets), counts, strict=True))
        return Measured(_total(requests), _total(errors), times)

    async def _ask(self, expression: str) -> list[tuple[Mapping[str, str], float]]:
        """Labels and value of each series of an instant query."""
        try:
            response = await self._http.get("/api/v1/query", params={"query": expression})
            answer: dict[str, Any] = response.raise_for_status().json()
            series = [(dict(item["metric"]), float(item["value"][1])) for item in answer["data"]["result"]]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise UnavailableError(f"Prometheus does not answer ({error!r}); check prometheusUrl") from None
        return [(labels, value) for labels, value in series if math.isfinite(value)]

    def _judged(self, deployments: Sequence[str], since: datetime) -> dict[str, Units]:
        try:
            with self._store.reading() as session:
                return judged_units(session, deployments, since)
        except (SQLAlchemyError, SteersmanError) as error:
            raise UnavailableError(f"the gateways' database does not answer ({error!r})") from None

    async def close(self) -> None:
        await self._http.aclose()
        self._store.close()


def _total(series: Sequence[tuple[Mapping[str, str], float]]) -> float:
    return sum(value for _, value in series)
