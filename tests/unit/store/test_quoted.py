"""What was looked up in business systems gets into training data only where a release says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steersman.cli import app
from steersman.store import Store
from steersman.store.feedback import Event, Judge, save_answer, submit
from steersman.store.models import Answer

RECORD = '[erp:order/2] {"name": "Ann Smith", "total": "39.80"}'
FOUND = {"tool": "order", "arguments": {"number": "2"}, "outcome": "found", "records": [{"system": "erp"}]}
MISSING = {"tool": "order", "arguments": {"number": "9"}, "outcome": "not_found", "records": []}
STAFF = Judge("staff", "olga")


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def fill(store: Store) -> None:
    """Answers of two people; what they were told of records is in every way that it can be repeated."""
    kept = {**FOUND, "text_read": RECORD}
    cases: dict[str, dict[str, Any]] = {
        "plain": {"answer": "We open at nine."},
        "unknown": {"lookups": [MISSING], "answer": "I have no such order."},
        "record": {"lookups": [kept, {**MISSING, "text_read": "[order 9] not found"}], "answer": "Ann, it is 39.80."},
        "forgotten": {"lookups": [FOUND], "answer": "Ann Smith paid 39.80."},
        "no consent": {"lookups": [kept], "consent": False},
        "quoting": {"prompt": said("order 2?", "Ann,  it is 39.80.", "thanks"), "answer": "Any time."},
        "of bob": {"end_customer": "bob", "prompt": said("hi", "Hello.", "when?"), "answer": "At nine."},
    }
    with store.transaction() as session:
        for key, case in cases.items():
            about = {"end_customer": "ann", "consent": True, "prompt": said(f"question {key}"), "answer": "Hm."} | case
            save_answer(session, Answer(id=key, customer="acme", **about))
            submit(session, "acme", Event(f"t-{key}", key, "thumbs", "up"), STAFF)
            submit(session, "acme", Event(f"e-{key}", key, "edit", f"Better: {about['answer']}"), STAFF)


def release(url: str, folder: Path, kind: str, *options: str) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Rows by the answer's id, and what was left out."""
    command = ["data", "release", "live", "--source", "feedback", "--splits", "train=1.0", "--store", url]
    for option in (f"kind={kind}", "pii.entities=", *options):
        command += ["--set", option]
    result = CliRunner().invoke(app, [*command, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    (made,) = (folder / "live").iterdir()
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    card = json.loads((made / "card.json").read_text())
    return {row["id"].removeprefix("answer:"): row for row in rows}, card["left out"]


@pytest.mark.parametrize("kind", ["feedback", "preference"])
def test_looked_up_records_stay_out_of_training_data_unless_asked_for(
    store: Store, store_url: str, tmp_path: Path, kind: str
) -> None:
    fill(store)
    rows, left_out = release(store_url, tmp_path, kind)
    assert set(rows) == {"plain", "unknown", "of bob"}
    assert "39.80" not in json.dumps(rows)
    assert "Ann" not in json.dumps(rows)
    assert left_out == {"rests on looked-up records": 3, "its conversation quotes looked-up records": 1}


@pytest.mark.parametrize("kind", ["feedback", "preference"])
def test_a_release_may_take_them_with_their_records_and_never_without_consent(
    store: Store, store_url: str, tmp_path: Path, kind: str
) -> None:
    fill(store)
    rows, left_out = release(store_url, tmp_path, kind, "lookups=include")
    assert set(rows) == {"plain", "unknown", "of bob", "record", "quoting"}
    context = {"role": "system", "content": f"{RECORD}\n[order 9] not found"}
    assert rows["record"]["prompt"] == [context, *said("question record")]
    assert left_out == {"its looked-up records were not kept": 1, "no consent": 1}


def test_edits_of_browsers_become_preferred_answers_only_where_a_release_says_so(
    store: Store, store_url: str, tmp_path: Path
) -> None:
    fill(store)
    with store.transaction() as session:
        save_answer(session, Answer(id="b", customer="acme", prompt=said("x"), answer="y", consent=True))
        submit(session, "acme", Event("browser", "b", "edit", "ARRR"), Judge("browser"))
    assert "b" not in release(store_url, tmp_path / "1", "preference")[0]
    rows, _ = release(store_url, tmp_path / "2", "preference", "browser_edits=true")
    assert rows["b"]["chosen"] == [{"role": "assistant", "content": "ARRR"}]
