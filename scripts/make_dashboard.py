"""Writes the Grafana dashboard of the chart: `python scripts/make_dashboard.py [--check]`.

The panels are a table here, because the JSON that Grafana wants says the same thing forty times.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from steersman.canary import OUR_FAULT

TARGET = Path(__file__).resolve().parent.parent / "charts/steersman/files/dashboard.json"
N = 'namespace=~"$namespace"'
PODS = f'{N},pod=~"$pod"'
ERRORS = f'outcome=~"{"|".join(OUR_FAULT)}"'


Query = tuple[str, str]
"""Expression and legend."""
Shown = tuple[str, str, tuple[Query, ...]]
"""Title, unit and queries of a panel."""


def quantile(share: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{{PODS}}}[$__rate_interval])))"


def rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{PODS}}}[$__rate_interval]))"


def quantiles(metric: str) -> list[Query]:
    return [(quantile(q, metric), f"p{int(q * 100)}") for q in (0.5, 0.95, 0.99)]


def shown(title: str, unit: str, *queries: Query) -> Shown:
    return title, unit, queries


THUMBS = f'steersman_gateway_feedback_total{{{PODS},kind="thumbs"'
ANSWERS = f"steersman_gateway_answers_total{{{PODS}"
FAILED = f"sum(rate({ANSWERS},{ERRORS}}}[$__rate_interval])) / sum(rate({ANSWERS}}}[$__rate_interval]))"
DOWN = f'sum(increase({THUMBS},value="down"}}[6h])) / sum(increase({THUMBS}}}[6h]))'
LOOKUPS = rate("steersman_gateway_lookups_total", "system, outcome")
RUNNING, QUEUED = (f"sum(steersman_gateway_{name}_answers{{{PODS}}})" for name in ("running", "queued"))
ROWS: dict[str, list[Shown]] = {
    "Answers": [
        shown("Answers a second", "reqps", (rate("steersman_gateway_answers_total", "outcome"), "{{outcome}}")),
        shown("Share that fails", "percentunit", (FAILED, "failed")),
        shown("Time to the first token", "s", *quantiles("steersman_gateway_first_token_seconds")),
        shown("Time to the whole answer", "s", *quantiles("steersman_gateway_answer_seconds")),
        shown("Tokens a second", "short", (rate("steersman_gateway_tokens_total", "kind"), "{{kind}}")),
        shown("In generation and waiting", "short", (RUNNING, "in generation"), (QUEUED, "waiting")),
        shown("Requests by status", "reqps", (rate("steersman_gateway_requests_total", "status"), "{{status}}")),
        shown("Reads of business records", "reqps", (LOOKUPS, "{{system}} {{outcome}}")),
    ],
    "Feedback and versions": [
        shown("Thumbs in an hour", "short", (f"sum by (value) (increase({THUMBS}}}[1h]))", "{{value}}")),
        shown("Share of thumbs down in 6 hours", "percentunit", (DOWN, "thumbs down")),
        shown("Weights version", "short", (f"steersman_gateway_weights_version{{{PODS}}}", "{{pod}}")),
        shown("Replicas ready", "short", (f"sum by (pod) (steersman_gateway_replica_ready{{{PODS}}})", "{{pod}}")),
    ],
    "Engines": [
        shown("Sampled tokens a second", "short", (rate("steersman_generated_tokens_total", "pod"), "{{pod}}")),
        shown(
            "Samples running and waiting",
            "short",
            (f"sum by (pod) (steersman_generation_running{{{PODS}}})", "{{pod}} running"),
            (f"sum by (pod) (steersman_generation_waiting{{{PODS}}})", "{{pod}} waiting"),
        ),
        shown("Weights of each policy replica", "short", (f"steersman_weights_version{{{PODS}}}", "{{pod}}")),
        shown("Calls, 95th percentile", "s", (quantile(0.95, "steersman_request_seconds", "method"), "{{method}}")),
        shown("Calls by status", "reqps", (rate("steersman_requests_total", "method, code"), "{{method}} {{code}}")),
        shown("Calls in progress", "short", (f"sum by (pod) (steersman_requests_running{{{PODS}}})", "{{pod}}")),
        shown(
            "Answers scored, and without a score",
            "reqps",
            (rate("steersman_scored_items_total", "pod"), "{{pod}} scored"),
            (rate("steersman_score_failures_total", "pod"), "{{pod}} failed"),
        ),
    ],
    "Runs": [
        shown("Runs by phase", "short", (f"sum by (phase) (steersman_controller_runs{{{N}}})", "{{phase}}")),
        shown("Looks at runs", "reqps", (rate("steersman_controller_reconciles_total", "result"), "{{result}}")),
        shown("Time of a look", "s", (quantile(0.95, "steersman_controller_reconcile_seconds"), "p95")),
    ],
}


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(_panel(len(panels), title, "row", {"h": 1, "w": 24, "x": 0, "y": top}))
        top += 1
        for index, (name, unit, queries) in enumerate(row):
            grid = {"h": 7, "w": 8, "x": 8 * (index % 3), "y": top + 7 * (index // 3)}
            panel = _panel(len(panels), name, "timeseries", grid)
            panel["datasource"] = {"type": "prometheus", "uid": "${datasource}"}
            panel["fieldConfig"] = {"defaults": {"unit": unit, "min": 0}, "overrides": []}
            panel["targets"] = [
                {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend}
                for number, (expression, legend) in enumerate(queries)
            ]
            panels.append(panel)
        top += 7 * (-(-len(row) // 3))
    return {
        "uid": "steersman",
        "title": "Steersman",
        "tags": ["steersman"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("namespace", "label_values(steersman_gateway_info, namespace)"),
                _variable("pod", f'label_values({{{N},__name__=~"steersman_.+"}}, pod)'),
            ]
        },
        "panels": panels,
    }


def _panel(number: int, title: str, kind: str, grid: dict[str, int]) -> dict[str, Any]:
    return {"id": number + 1, "title": title, "type": kind, "gridPos": grid}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "refresh": 2,
        "current": {"text": "All", "value": "$__all"},
    }


def main(arguments: list[str]) -> int:
    wanted = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in arguments:
        return 0 if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == wanted else 1
    TARGET.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
