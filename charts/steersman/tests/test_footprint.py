"""The small profile's memory comes from measurement: `make bench-footprint`, kept in benchmarks/results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_chart_objects import pods

from benchmarks.footprint import chart_memory, mib, report

ROOM = 1.2
"""What is allocated beyond the peak of a small run: longer prompts, fragmentation, page cache that counts."""


@pytest.fixture(scope="module")
def measured(chart) -> dict[str, Any]:
    return json.loads((chart.parents[1] / "benchmarks/results/footprint.json").read_text())


def test_every_process_fits_its_limit_with_room(measured) -> None:
    chart = chart_memory()
    for name, row in measured["processes"].items():
        limit = chart[row["component"]]["limits"]
        assert row["limit_mib"] == limit, f"{name}: measured against another profile; run make bench-footprint"
        assert ROOM * row["peak_mib"] <= limit, f"{name}: peak {row['peak_mib']} MiB, limit {limit} MiB"
        assert (
            limit
            <= 3
            * ROOM
            * max(
                other["peak_mib"] for other in measured["processes"].values() if other["component"] == row["component"]
            )
            + 256
        ), f"{name}: the limit is far from what was measured"


def test_what_is_asked_for_is_most_of_what_is_used(measured) -> None:
    """So that a node that takes the pods can hold them."""
    chart = chart_memory()
    for name, row in measured["processes"].items():
        assert chart[row["component"]]["requests"] >= row["peak_mib"] / 2, name


def test_what_holds_a_model_was_measured(measured) -> None:
    components = {row["component"] for row in measured["processes"].values()}
    assert components >= {"policy", "reward", "reference", "trainer", "controller", "gateway"}
    stages = {f"trainer {stage}" for stage in ("sft", "reward-model", "rl", "evaluate")}
    assert {"prepare", *stages} <= set(measured["processes"])
    assert measured["profile"] == "values-cpu.yaml"


def test_the_benchmark_reads_what_helm_renders(helm) -> None:
    chart = chart_memory()
    for name, spec in pods(helm.render("cpu")).items():
        component = name.rpartition("/")[2].removeprefix("steersman-")
        if component in chart:
            resources = spec["containers"][0]["resources"]
            for kind in ("requests", "limits"):
                assert mib(resources[kind]["memory"]) == chart[component][kind], name


def test_a_peak_above_its_limit_is_said() -> None:
    rows = report({"policy": 1e6, "trainer sft": 1.0, "prepare": 2.0})["processes"]
    assert rows["policy"]["fits"] is False
    assert rows["trainer sft"]["fits"] is True
    assert rows["prepare"]["component"] == "trainer"
