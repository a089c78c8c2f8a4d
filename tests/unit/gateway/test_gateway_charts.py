"""Charts: what is drawn where."""

from __future__ import annotations

from services.gateway.pages.charts import Chart, largest

TIMES = ["a", "b", "c", "d"]


def test_bars_stand_upon_each_other_and_fill_the_axis() -> None:
    chart = Chart("Traffic", "answers", "bars", TIMES, {"good": [10, 0, 30, 0], "bad": [10, 0, 5, 0]})
    assert chart.top == 50
    assert [(bar.series, bar.x, bar.y, bar.height) for bar in chart.bars] == [
        (0, 2.5, 80, 20), (1, 2.5, 60, 20), (0, 52.5, 40, 60), (1, 52.5, 30, 10),
    ]  # fmt: skip
    assert chart.bars[0].title == "a: 10 good"
    assert chart.said == "Traffic: 40 good, 15 bad"


def test_a_line_is_broken_where_there_is_no_value() -> None:
    chart = Chart("Latency", "milliseconds", "lines", TIMES, {"p50": [100, 200, None, 50]})
    assert chart.top == 200
    (piece,) = chart.pieces
    assert (piece.x, piece.y, piece.x + piece.width, piece.y + piece.height) == (12.5, 50, 37.5, 0)
    assert [dot.y for dot in chart.dots] == [50, 0, 75]


def test_the_axis_ends_at_a_round_number() -> None:
    tops = [Chart("", "", "bars", ["a"], {"n": [value]}).top for value in (0, 0.4, 1, 2, 3, 7, 10, 11, 999, 1001)]
    assert tops == [1, 1, 1, 2, 5, 10, 10, 20, 1000, 2000]


def test_nothing_is_said_to_be_nothing() -> None:
    for series in ({}, {"n": [0, 0]}, {"n": [None]}):
        assert Chart("Errors", "answers", "bars", TIMES, series).empty
    assert Chart("Errors", "answers", "bars", TIMES, {}).said == "Errors: nothing in this time"


def test_rare_reasons_are_added_up_where_colours_end() -> None:
    counts = {f"reason {n}": [n, n] for n in range(9)}
    shown = largest(counts)
    assert list(shown) == ["reason 8", "reason 7", "reason 6", "reason 5", "reason 4", "other"]
    assert shown["other"] == [6, 6]
    assert list(largest({"b": [1], "a": [1], "c": [2]})) == ["c", "a", "b"]
