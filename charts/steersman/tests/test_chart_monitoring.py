"""Dashboard, alerts, autoscalers and the canary ask only for metrics that the services really export."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import socket
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import promql_parser
import pytest
import yaml
from prometheus_client import REGISTRY

import services.controller.operator  # noqa: F401  registers the controller's metrics
from services.controller.kserve import KServeEndpoint
from services.controller.signals import QUERIES, query
from services.controller.split import SplitEndpoint
from services.gateway.config import GatewayConfig
from services.gateway.server import Gateway
from steersman.config.base import load_model
from steersman.rpc.metrics import serve_metrics

ROOT = Path(__file__).resolve().parents[3]
SUFFIX = re.compile(r"_(bucket|sum|count)$")


def contract() -> dict[str, tuple[str, set[str]]]:
    """(type, labels) by metric name, from docs/metrics.md."""
    rows = re.findall(r"^\| `(steersman_\w+)` \| (\w+) \| ([^|]*)\|", (ROOT / "docs/metrics.md").read_text(), re.M)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


@pytest.fixture(scope="module")
def exported() -> dict[str, tuple[str, set[str]]]:
    """(type, labels) by metric name, from the endpoints of a real gateway and of the process that the other services
    share here: the parts that they import register their metrics in one registry.
    """
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        front_port, back_port = one.getsockname()[1], other.getsockname()[1]
    config = {"port": 0, "grpcPort": 0, "metricsPort": front_port, "policy": {"endpoints": ["127.0.0.1:9"]}}

    def page(port: int) -> str:
        return urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()

    async def scraped() -> tuple[Gateway, str, str]:
        gateway = Gateway(load_model(GatewayConfig, config, "test"))
        await gateway.start()
        serve_metrics("127.0.0.1", back_port)
        front = await asyncio.to_thread(page, front_port)
        back = await asyncio.to_thread(page, back_port)
        await gateway.drain()
        return gateway, front, back

    gateway, front, back = asyncio.run(scraped())
    kinds = dict(re.findall(r"^# TYPE (steersman_\w+?(?<!_created)) (\w+)$", front + back, re.M))
    metrics = [*gateway.metrics.registry._collector_to_names, *REGISTRY._collector_to_names]
    labels = {one._name: set(one._labelnames) for one in metrics if hasattr(one, "_labelnames")}
    labels["steersman_gateway_replica_ready"] = {"replica"}
    assert 'steersman_gateway_replica_ready{replica="127.0.0.1:9"} 0.0' in front
    return {name: (kind, labels[name.removesuffix("_total")]) for name, kind in kinds.items()}


def expressions() -> list[str]:
    files = ROOT / "charts/steersman/files"
    board = json.loads((files / "dashboard.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    groups = yaml.safe_load((files / "alerts.yaml").read_text())["groups"]
    found += [rule["expr"] for group in groups for rule in group["rules"]]
    service = {"metadata": {"name": "chat"}, "spec": {"predictor": {}}}
    kserve = KServeEndpoint(service, "run").variants("c1")
    split = SplitEndpoint({}, {"metadata": {"name": "steersman-policy"}}).variants("c1")
    found += [query(kind, "ml", variant, 600) for kind in QUERIES for variant in (*kserve, *split)]
    return [text.replace("$__rate_interval", "5m").replace("$namespace", ".*").replace("$pod", ".*") for text in found]


def selectors(node: Any) -> list[promql_parser.VectorSelector]:
    """Every selector of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    parts = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "param")]
    parts += list(getattr(node, "args", None) or [])
    return [found for part in parts if part is not None for found in selectors(part)]


@pytest.mark.parametrize("expression", expressions())
def test_queries_parse_and_ask_for_what_is_exported(expression, exported):
    used = selectors(promql_parser.parse(expression))
    assert used
    for selector in used:
        name = selector.name if selector.name in exported else SUFFIX.sub("", selector.name)
        assert name in exported, f"no service exports {selector.name}"
        labels = {matcher.name for matcher in selector.matchers.matchers} - {"namespace", "pod", "__name__"}
        assert labels <= exported[name][1], f"{selector.name} has no labels {labels - exported[name][1]}"


def test_the_documentation_lists_exactly_what_is_exported(exported):
    assert contract() == exported


def test_the_dashboard_is_what_its_table_says():
    spec = importlib.util.spec_from_file_location("make_dashboard", ROOT / "scripts/make_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0, "run python scripts/make_dashboard.py"
    board = module.dashboard()
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    taken = {(place["x"], place["y"]) for place in places}
    assert len(taken) == len(places), "two panels at the same place"


def test_every_alert_tells_what_to_do():
    groups = yaml.safe_load((ROOT / "charts/steersman/files/alerts.yaml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["description"].endswith(".")
