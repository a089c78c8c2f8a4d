"""What the operator's page counts, and the search in the audit trail, on both databases."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest

from services.gateway.errors import BadRequestError
from services.gateway.pages.audit import Search, find_lines
from services.gateway.pages.figures import SPANS, operator_figures, reason
from services.gateway.store import Audit
from steersman.store import Store
from steersman.store.models import Answer, FeedbackEvent

NOW = dt.datetime(2026, 11, 26, 12, 30, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store.open(store_url)
    yield opened
    opened.engine.dispose()


def line(hours_ago: float, outcome: str = "stop", action: str = "answer", **changes: Any) -> Audit:
    given = {
        "at": NOW - hours_ago * HOUR, "request_id": "r", "action": action, "outcome": outcome, "tenant": "acme",
        "key_id": "k", "customer": "", "weights_version": "", "prompt_tokens": 0, "completion_tokens": 0,
    } | changes  # fmt: skip
    return Audit(**given)


def figures(store: Store, lines: list[Any], span: str = "24h") -> dict[str, Any]:
    with store.transaction() as session:
        session.add_all(lines)
    with store.reading() as session:
        found = operator_figures(session, SPANS[span], NOW)
        return found | {"charts": {chart.title: chart for chart in found["charts"]}}


def test_every_answer_and_token_is_in_the_hour_it_fell_in(store: Store) -> None:
    lines = [
        line(0, prompt_tokens=10, completion_tokens=5),
        line(0.5, prompt_tokens=1, completion_tokens=2),  # 12:00 to the minute
        line(0.51, prompt_tokens=100, completion_tokens=50),
        line(23.5),  # 13:00 yesterday: the first hour that is shown
        line(23.51),
    ]
    found = figures(store, lines)
    traffic = found["charts"]["Traffic"]
    assert (found["answers"], found["prompt_tokens"], found["completion_tokens"]) == (4, 111, 57)
    assert (traffic.times[0], traffic.times[-1]) == ("13:00", "12:00")
    assert [traffic.series["answers"][at] for at in (0, 1, 22, 23)] == [1, 0, 1, 2]
    assert found["charts"]["Tokens"].series["prompt"][22:] == [100, 11]
    assert found["charts"]["Tokens"].series["answer"][22:] == [50, 7]


def test_refusals_count_what_they_gathered_and_errors_stand_by_reason(store: Store) -> None:
    lines = [
        line(1, "RateLimitedError", "refused", records=[{"count": 7, "paths": ["/v1"]}]),
        line(2, "RateLimitedError", "refused", records=[{"count": 3, "paths": []}]),
        line(1, "UnauthenticatedError", "refused", tenant="", records=[{"count": 2}]),
        line(1, "UnavailableError"),
        line(1, "cancelled"),
        line(1, "length"),
    ]
    found = figures(store, lines)
    assert found["refusals"] == [("RateLimitedError", 10), ("UnauthenticatedError", 2)]
    assert {name: sum(n) for name, n in found["charts"]["Refusals"].series.items()} == {
        "rate limited": 10, "unauthenticated": 2,
    }  # fmt: skip
    assert {name: sum(n) for name, n in found["charts"]["Errors"].series.items()} == {"cancelled": 1, "unavailable": 1}
    assert found["answers"] == 3


def test_times_are_those_of_good_answers_by_nearest_rank(store: Store) -> None:
    lines = [line(1, milliseconds=ms, first_token_milliseconds=ms // 10) for ms in range(100, 2100, 100)]
    lines += [line(5, milliseconds=40), line(1, "UnavailableError", milliseconds=60_000)]
    found = figures(store, lines)
    latency = found["charts"]["Latency"].series
    assert (latency["p50"][22], latency["p95"][22]) == (1100, 2000)
    assert (latency["p50"][18], latency["p95"][18]) == (40, 40)
    assert latency["p50"][20] is None, "no answer is no answer within 0 ms"
    assert found["first_token"] == {"p50": 110, "p95": 200}


def test_weights_are_marked_when_they_begin_to_serve_and_when_they_come_back(store: Store) -> None:
    lines = [
        line(30, weights_version="1"),
        line(20, weights_version="1"),
        line(10.25, weights_version="2"),
        line(10, weights_version="2"),
        line(8, weights_version="2"),
        line(8, weights_version="3"),  # both answer: a canary
        line(4, weights_version="2"),
        line(2, weights_version="1"),
    ]
    marks = figures(store, lines)["marks"]
    assert [mark.name for mark in marks] == [
        "2 from 26 Nov 02:15", "3 from 26 Nov 04:30", "1 from 26 Nov 10:30",
    ]  # fmt: skip
    assert [mark.number for mark in marks] == [1, 2, 3]
    # 02:15 is 13.25 of the 24 hours after 13:00.
    assert marks[0].place == pytest.approx(13.25 / 24)


def test_feedback_stands_at_the_hour_it_was_given(store: Store) -> None:
    answer = Answer(id="a", prompt=[], answer="yes", created_at=NOW - 30 * HOUR, deployment="champion")
    said = [("thumbs", "up", 3), ("thumbs", "down", 3), ("thumbs", "down", 3), ("edit", "better", 1)]
    events = [
        FeedbackEvent(customer="", event_id=str(n), answer_id="a", kind=kind, value=value, received_at=NOW - ago * HOUR)
        for n, (kind, value, ago) in enumerate(said)
    ]
    with store.transaction() as session:
        session.add(answer)
    feedback = figures(store, events)["charts"]["Feedback"].series
    assert (feedback["down"][20], feedback["up"][20], feedback["edit"][22]) == (2, 1, 1)


@pytest.mark.parametrize("name", list(SPANS))
def test_every_range_is_whole_and_ends_now(store: Store, name: str) -> None:
    edges = SPANS[name].edges(NOW)
    assert edges[-2] <= NOW < edges[-1]
    found = figures(store, [line(0)], name)
    assert sum(found["charts"]["Traffic"].series["answers"]) == 1
    assert len(found["charts"]["Traffic"].times) == SPANS[name].parts


def test_the_trail_is_found_by_any_of_its_references_and_never_another_tenants(store: Store) -> None:
    with store.transaction() as session:
        session.add_all(
            [
                line(3, answer_id="a-1", records=[{"system": "erp", "record": "order/2"}]),
                line(2, answer_id="a-2", customer="C-A", weights_version="7"),
                line(1, "RateLimitedError", "refused", key_id="k9", records=[{"count": 2, "paths": ["/v1/100%"]}]),
                line(1, "UnauthenticatedError", "refused", tenant="", key_id=""),
                line(0.5, answer_id="a-3", tenant="bolt", records=[{"system": "erp", "record": "order/2"}]),
            ]
        )

    def ids(tenant: str | None = "acme", **search: Any) -> list[str]:
        with store.reading() as session:
            return [found.answer_id or found.outcome for found in find_lines(session, Search(**search), tenant)[0]]

    assert ids(q="order/2") == ["a-1"]
    assert ids(None, q="order/2") == ["a-3", "a-1"]
    assert ids(q="C-A") == ids(q="7") == ids(q="a-2") == ["a-2"]
    assert ids(q="k9") == ids(q="0%") == ["RateLimitedError"], "a percent sign is no wildcard"
    assert ids(q="%") == ["RateLimitedError"]
    assert ids(action="refused") == ["UnauthenticatedError", "RateLimitedError"]
    assert ids(since=NOW - 2.5 * HOUR, action="answer") == ["a-2"]
    for wrong in ({"action": "drop"}, {"q": "a\0"}):
        with pytest.raises(BadRequestError):
            Search(**wrong)


def test_the_trail_is_read_page_by_page(store: Store) -> None:
    with store.transaction() as session:
        session.add_all([line(0, answer_id=str(n)) for n in range(250)])
    seen: list[str] = []
    before, pages = 0, 0
    while pages == 0 or before:
        with store.reading() as session:
            lines, before = find_lines(session, Search(before=before), None)
            seen += [found.answer_id for found in lines]
        pages += 1
    assert (pages, seen) == (3, [str(n) for n in reversed(range(250))])


def test_reasons_read_as_words() -> None:
    assert [reason(name) for name in ("RateLimitedError", "cancelled", "")] == ["rate limited", "cancelled", "unknown"]
