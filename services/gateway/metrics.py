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

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"steersman_gateway_{name}", help_text, labels, registry=self.registry)

        def seconds(name: str, help_text: str, *labels: str) -> Histogram:
            name = f"steersman_gateway_{name}_seconds"
            return Histogram(name, help_text, labels, buckets=_SECONDS, registry=self.registry)

        self.requests = counter("requests", "HTTP requests.", "route", "status")
        self.answers = counter("answers", "Answers by how they ended.", "outcome")
        text = "Answers of champion and candidate by how they ended."
        self.variant_answers = counter("variant_answers", text, "outcome", "variant")
        self.tokens = counter("tokens", "Tokens.", "kind")
        self.first_token = seconds("first_token", "Time to the first token.")
        self.duration = seconds("answer", "Time to the end of an answer.")
        text = "Time to the end of an answer of champion and candidate."
        self.variant_duration = seconds("variant_answer", text, "variant")
        self.model_answers = counter("model_answers", "Answers of each model by how they ended.", "model", "outcome")
        self.model_tokens = counter("model_tokens", "Tokens of each model.", "model", "kind")
        self.model_duration = seconds("model_answer", "Time to the end of an answer of each model.", "model")
        self.stand_ins = counter("model_stand_ins", "Answers that a model gave for another.", "model", "by")
        self.feedback = counter("feedback", "Judgements stored.", "kind", "value")
        self.lookups = counter("lookups", "Reads of business records.", "system", "outcome")
        text = "Answers by what they state about business records: none, sourced, held, marked, refused."
        self.claims = counter("claims", text, "outcome")
        text = "Webhooks and tickets of other systems: taken, ignored, and how a look at a ticket ended."
        self.inbox = counter("inbox", text, "inbox", "outcome")
        Gauge("steersman_gateway_info", "The model served.", ["model"], registry=self.registry).labels(model).set(1)

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
