"""Prometheus metrics that every gRPC service exports; docs/metrics.md lists them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from steersman.errors import ConfigError, SteersmanError

REQUESTS = Counter("steersman_requests_total", "gRPC calls by full method and status code", ["method", "code"])
SECONDS = Histogram(
    "steersman_request_seconds",
    "Time of a call",
    ["method"],
    buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
RUNNING = Gauge("steersman_requests_running", "Calls in progress")
GENERATED_TOKENS = Counter("steersman_generated_tokens_total", "Tokens sampled")
GENERATION_RUNNING = Gauge("steersman_generation_running", "Samples in the batch")
GENERATION_WAITING = Gauge("steersman_generation_waiting", "Samples that wait for room in the KV cache")
WEIGHTS_VERSION = Gauge("steersman_weights_version", "Version of the weights in use")
SCORED_ITEMS = Counter("steersman_scored_items_total", "Answers scored")
SCORE_FAILURES = Counter("steersman_score_failures_total", "Answers without a score")


@contextmanager
def track(method: str) -> Iterator[None]:
    """Counts and times one call, whatever its end."""
    start, code = time.perf_counter(), "OK"
    RUNNING.inc()
    try:
        yield
    except SteersmanError as error:
        code = error.grpc_code
        raise
    except (asyncio.CancelledError, GeneratorExit):
        code = "CANCELLED"
        raise
    except Exception:
        code = "INTERNAL"
        raise
    finally:
        RUNNING.dec()
        SECONDS.labels(method).observe(time.perf_counter() - start)
        REQUESTS.labels(method, code).inc()


def serve_metrics(host: str, port: int, registry: CollectorRegistry = REGISTRY) -> None:
    """Answers Prometheus on a thread; ConfigError when the port is taken."""
    try:
        start_http_server(port, host, registry)
    except OSError:
        raise ConfigError(f"metricsPort: {host}:{port} is in use; choose another port") from None
