"""Live signals of the two variants of a bot: errors and latency from Prometheus, judgements from the store.

Judgements are counted where the answer was given, not where the judgement arrived: the store keeps the deployment of
every answer, and a load balancer may send a thumb to either variant.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import httpx

from services.controller.model import Manifest, Signals
from services.controller.status import VariantSignals
from steersman.errors import UnavailableError
from steersman.store.engine import Store
from steersman.store.feedback import feedback_counts

OUR_FAULT = "InternalError|UnavailableError|DeadlineError|StorageError|SteersmanError"
"""Outcomes of an answer that count as errors; what a caller did wrong does not."""

QUERIES: Mapping[str, str] = {
    "requests": "sum(increase(steersman_gateway_answers_total{{{pods}}}[{window}s]))",
    "errors": 'sum(increase(steersman_gateway_answers_total{{{pods},outcome=~"' + OUR_FAULT + '"}}[{window}s]))',
    "latency": (
        "histogram_quantile(0.5, sum by (le) (increase(steersman_gateway_answer_seconds_bucket{{{pods}}}[{window}s])))"
    ),
}


def component(service: Manifest, variant: str | None) -> str:
    """Name that KServe gives the Deployment and the pods of a predictor (constants.PredictorServiceName)."""
    name = service["metadata"]["name"]
    return f"{name}-{variant}-predictor" if variant else f"{name}-predictor"


def query(kind: str, namespace: str, workload: str, seconds: float) -> str:
    """PromQL over the pods of one Deployment since `seconds` ago."""
    pods = f'namespace="{namespace}",pod=~"{workload}-[a-z0-9]+-[a-z0-9]+"'
    return QUERIES[kind].format(pods=pods, window=max(60, math.ceil(seconds)))


class LiveSignals:
    """Reads both sources."""

    def __init__(
        self, prometheus_url: str, database_url: str, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """`transport`: how Prometheus is reached; None: over the network."""
        self._http = httpx.AsyncClient(base_url=prometheus_url, timeout=10.0, transport=transport)
        self._store = Store.open(database_url, migrate=False)

    async def read(self, service: Manifest, candidate: str, since: datetime, now: datetime) -> Signals:
        """Signals of the stable predictor and of the candidate since a time.

        Raises:
            UnavailableError: a source does not answer, or Prometheus refuses the query.
        """
        stable = service["spec"]["predictor"].get("name")
        champion, challenger = await asyncio.gather(
            self._variant(service, stable, since, now), self._variant(service, candidate, since, now)
        )
        return Signals(champion, challenger)

    async def _variant(self, service: Manifest, variant: str | None, since: datetime, now: datetime) -> VariantSignals:
        workload = component(service, variant)
        namespace = service["metadata"]["namespace"]
        seconds = (now - since).total_seconds()
        requests, errors, latency = await asyncio.gather(
            *(self._value(query(kind, namespace, workload, seconds)) for kind in ("requests", "errors", "latency"))
        )
        thumbs = await asyncio.to_thread(self._thumbs, f"isvc.{workload}", since)
        judged = thumbs["up"] + thumbs["down"]
        return VariantSignals(
            requests=requests or 0.0,
            error_rate=(errors or 0.0) / requests if requests else 0.0,
            feedback=judged,
            thumbs_down_share=thumbs["down"] / judged if judged else 0.0,
            latency_seconds=latency,
        )

    async def _value(self, expression: str) -> float | None:
        """The single number of an instant query; None when there is no such series yet."""
        try:
            response = await self._http.get("/api/v1/query", params={"query": expression})
            answer: dict[str, Any] = response.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError(f"Prometheus does not answer ({error}); check prometheusUrl") from None
        results = answer["data"]["result"]
        value = float(results[0]["value"][1]) if results else math.nan
        return value if math.isfinite(value) else None

    def _thumbs(self, deployment: str, since: datetime) -> dict[str, int]:
        with self._store.reading() as session:
            counts = feedback_counts(session, deployment, since)
        return {value: counts[("thumbs", value)] for value in ("up", "down")}

    async def close(self) -> None:
        await self._http.aclose()
        self._store.close()
