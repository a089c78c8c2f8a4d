"""The table 'client x call' in the docs is what was measured last, and nothing in it is broken."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.clients.table import table

ROOT = Path(__file__).resolve().parents[3]


def test_the_docs_show_the_last_measurement_of_the_clients() -> None:
    report = json.loads((ROOT / "benchmarks/results/clients.json").read_text())
    assert report["broken"] == []
    assert table(report) in (ROOT / "docs/gateway.md").read_text()
    for client in report["versions"]:
        assert any(name.startswith(f"{client} ") for name in report["works"]), client


def test_a_row_is_a_call_and_a_column_a_client() -> None:
    report = {
        "works": ["a chat", "b chat"],
        "refused_by_name": ["a images"],
        "broken": ["b tools"],
        "versions": {"a": {"a": "1.0"}, "b": {"b": "2.0"}},
    }
    assert table(report).split("\n") == [
        "| call | a 1.0 | b 2.0 |",
        "| --- | --- | --- |",
        "| chat | yes | yes |",
        "| images | refused by name |  |",
        "| tools |  | **broken** |",
    ]
