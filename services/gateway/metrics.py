"""Prometheus metrics of one gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        name = "steersman_gateway"
        self.requests = Counter(f"{name}_requests", "HTTP requests.", ["route", "status"], registry=self.registry)
        self.answers = Counter(f"{name}_answers", "Answers by how they ended.", ["outcome"], registry=self.registry)
        self.variant_answers = Counter(
            f"{name}_variant_answers",
            "Answers of champion and candidate by how they ended.",
            ["outcome", "variant"],
            registry=self.registry,
        )
        self.tokens = Counter(f"{name}_tokens", "Tokens.", ["kind"], registry=self.registry)
        self.first_token = Histogram(
            f"{name}_first_token_seconds", "Time to the first token.", buckets=_SECONDS, registry=self.registry
        )
        self.duration = Histogram(
            f"{name}_answer_seconds", "Time to the end of an answer.", buckets=_SECONDS, registry=self.registry
        )
        self.variant_duration = Histogram(
            f"{name}_variant_answer_seconds",
            "Time to the end of an answer of champion and candidate.",
            ["variant"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.model_answers = Counter(
            f"{name}_model_answers",
            "Answers of each model by how they ended.",
            ["model", "outcome"],
            registry=self.registry,
        )
        self.model_tokens = Counter(
            f"{name}_model_tokens", "Tokens of each model.", ["model", "kind"], registry=self.registry
        )
        self.model_duration = Histogram(
            f"{name}_model_answer_seconds",
            "Time to the end of an answer of each model.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stand_ins = Counter(
            f"{name}_model_stand_ins",
            "Answers that a model gave for another.",
            ["model", "by"],
            registry=self.registry,
        )
        self.feedback = Counter(f"{name}_feedback", "Judgements stored.", ["kind", "value"], registry=self.registry)
        self.lookups = Counter(
            f"{name}_lookups", "Reads of business records.", ["system", "outcome"], registry=self.registry
        )
        self.claims = Counter(
            f"{name}_claims",
            "Answers by what they state about business records: none, sourced, held, marked, refused.",
            ["outcome"],
            registry=self.registry,
        )
        self.inbox = Counter(
            f"{name}_inbox",
            "Webhooks and tickets of other systems: taken, ignored, and how a look at a ticket ended.",
            ["inbox", "outcome"],
            registry=self.registry,
        )
        info = Gauge(f"{name}_info", "The model served.", ["model"], registry=self.registry)
        info.labels(model).set(1)

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(f"steersman_gateway_{name}", help_text, registry=self.registry).set_function(value)

    def replicas(self, ready: Callable[[], dict[str, bool]]) -> None:
        """Whether each replica is ready."""
        self.registry.register(_Replicas(ready))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Replicas(Collector):
    def __init__(self, ready: Callable[[], dict[str, bool]]) -> None:
        self._ready = ready

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("steersman_gateway_replica_ready", "1: the replica answers.", labels=["replica"])
        for target, ready in self._ready().items():
            family.add_metric([target], float(ready))
        yield family
