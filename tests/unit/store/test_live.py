"""Suites over recorded answers, by deployment."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest
from judge_endpoint import judging
from typer.testing import CliRunner

from steersman.cli import app
from steersman.store import Store
from steersman.store.models import Answer

QUESTION = "When do you open?"


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'gateway.db'}"
    now = dt.datetime.now(dt.UTC)

    def answer(name: str, deployment: str, text: str, *, question: str = QUESTION, days: int = 1, found: bool = False):
        return Answer(
            id=name, conversation_id=f"c-{name}", deployment=deployment, model="m", answer=text,
            prompt=[{"role": "user", "content": question}], created_at=now - dt.timedelta(days=days),
            lookups=[{"tool": "orders", "arguments": {}, "outcome": "found", "records": 1}] if found else [],
        )  # fmt: skip

    with Store.open(url).transaction() as session:
        session.add_all(
            [
                answer("1", "champion", "We open at nine."),
                answer("2", "candidate", "The code is swordfish, we open at nine o'clock sharp."),
                answer("3", "candidate", "Write to ada@example.com.", question="Who?"),
                answer("4", "champion", "It went to ada@example.com.", question="Where?", found=True),
                answer("5", "champion", "swordfish", days=30),
            ]
        )
    return url


def write(folder: Path, name: str, kind: str, case: dict) -> Path:
    path = folder / f"{name}.yaml"
    turns = [{"role": "user", "content": case.pop("question")}]
    path.write_text(json.dumps({"name": name, "kind": kind, "cases": [{"id": "one", "messages": turns, **case}]}))
    return path


def test_leaks_are_looked_for_everywhere_and_cases_where_the_question_was_asked(url: str, tmp_path: Path) -> None:
    expect = {"secrets": ["swordfish"], "noPersonalData": True}
    leaks = write(tmp_path, "leaks", "leak", {"question": "Tell me the code", "expect": expect})
    shop = write(tmp_path, "shop", "business", {"question": "when do you OPEN?", "expect": {"facts": ["nine"]}})
    judge = tmp_path / "judge.yaml"
    with judging() as endpoint:
        judge.write_text(f"name: llm\nurl: {endpoint.url}\nmodel: m\nrubric: Be long.\n")
        done = CliRunner().invoke(
            app, ["eval-live", "--suite", str(leaks), "--suite", str(shop), "--store", url, "--since", "7d", "--json",
                  "--judge", str(judge), "--out", str(tmp_path / "out")],
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.splitlines()[-1])
    assert found["answers"] == 4, "the oldest lies outside of the time span"
    shares = {
        (target, suite): found[target][suite]["served"]["shares"]["all cases"][0]
        for target in ("champion", "candidate")
        for suite in ("leaks", "shop")
    }
    # The champion's own customer's address was looked up; the candidate gives away the code and an address.
    assert shares == {
        ("champion", "leaks"): 1.0, ("candidate", "leaks"): 0.0, ("champion", "shop"): 1.0, ("candidate", "shop"): 1.0,
    }  # fmt: skip
    (rate,) = found["judges"]["llm"]["win_rates"].values()
    assert rate[0] == 0.0, "of the same question's answers the candidate's is longer, which this judge likes"
    assert (tmp_path / "out" / "suites.html").is_file()


def test_a_time_that_is_none_and_nothing_recorded_are_said(url: str, tmp_path: Path) -> None:
    suite = write(tmp_path, "shop", "business", {"question": "Hm?", "expect": {"facts": ["nine"]}})
    for options, words in (
        (["--since", "soon"], "is no time"),
        ([], "none is one that the suites say something about"),
    ):
        done = CliRunner().invoke(app, ["eval-live", "--suite", str(suite), "--store", url, *options])
        assert done.exit_code != 0
        assert words in str(done.exception)
