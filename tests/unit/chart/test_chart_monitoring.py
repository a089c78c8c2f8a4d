"""Dashboard, alerts, autoscalers and the canary ask only for metrics that the services export."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from services.controller import operator as controller
from services.controller.signals import QUERIES, query
from services.gateway.metrics import Metrics

ROOT = Path(__file__).resolve().parents[3]
SUFFIX = re.compile(r"_(bucket|sum|count)$")


def contract() -> dict[str, set[str]]:
    """Labels by metric name, from docs/metrics.md."""
    rows = re.findall(r"^\| `(steersman_\w+)` \| \w+ \| ([^|]*)\|", (ROOT / "docs/metrics.md").read_text(), re.M)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def expressions() -> list[str]:
    files = ROOT / "charts/steersman/files"
    board = json.loads((files / "dashboard.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    groups = yaml.safe_load((files / "alerts.yaml").read_text())["groups"]
    found += [rule["expr"] for group in groups for rule in group["rules"]]
    found += [query(kind, "ml", "chat-predictor", 600) for kind in QUERIES]
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
def test_queries_parse_and_use_names_and_labels_of_the_contract(expression):
    known = contract()
    used = selectors(promql_parser.parse(expression))
    assert used
    for selector in used:
        name = selector.name if selector.name in known else SUFFIX.sub("", selector.name)
        assert name in known, f"{selector.name} is not in docs/metrics.md"
        labels = {matcher.name for matcher in selector.matchers.matchers} - {"namespace", "pod", "__name__"}
        assert labels <= known[name], f"{selector.name} has no labels {labels - known[name]}"


def test_what_the_gateway_exports_is_in_the_contract():
    metrics = Metrics("model")
    metrics.replicas(lambda: {"a": True})
    _same(
        {family.name: set(family.samples[0].labels if family.samples else ()) for family in metrics.registry.collect()},
        "steersman_gateway_",
    )


def test_what_the_controller_exports_is_in_the_contract():
    exported = {
        family.name: set()
        for metric in (controller.LOOKS, controller.SECONDS, controller.RUNS)
        for family in metric.collect()
    }
    _same(exported, "steersman_controller_")


def _same(exported: dict[str, set[str]], prefix: str) -> None:
    documented = {name.removesuffix("_total") for name in contract() if name.startswith(prefix)}
    missing = {name.removesuffix("_total") for name in exported} - documented
    assert not missing, f"{missing} is exported but not in docs/metrics.md"


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
