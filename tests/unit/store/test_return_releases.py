"""Releases of returns: what every kind of judgement says a conversation was worth, by numbers worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steersman.data.aspects import Rule
from steersman.data.format import ImportOptions
from steersman.data.pii import PiiOptions
from steersman.data.records import Aspects, Feedback, Preference, Return, read_jsonl, row_type_of, write_jsonl
from steersman.data.returns import returns_of
from steersman.data.rules import ReleaseOptions
from steersman.data.table import ColumnMap, table_format
from steersman.errors import DataError
from steersman.store import Store
from steersman.store.feedback import Event, Judge, save_answer, submit
from steersman.store.judging import NewItem, NewJudgement, add_items, create_project, ensure_labeler, record
from steersman.store.models import Answer, Item
from steersman.store.releases import publish
from steersman.store.verdicts import Verdict

QUESTION = [{"role": "user", "content": "where is it?"}]
STAFF = Judge("staff", "anna")


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def released(store: Store, folder: Path, source: str, **changes: Any) -> dict[str, Any]:
    """Text of the completion's last turn -> reward."""
    values = {"name": "worth", "kind": "return", "sources": (source,), "pii": PiiOptions(entities=())}
    made, _ = publish(store, ReleaseOptions.model_validate({**values, "splits": {"train": 1.0}, **changes}), folder)
    rows = list(read_jsonl(Path(made.url) / "train.jsonl", Return))
    return {row.completion[-1].content: row.reward for row in rows}


def judged(store: Store, kind: str, answers: list[str], verdicts: list[Verdict]) -> None:
    with store.transaction() as session:
        project = create_project(session, "shop", kind, **({"aspects": ["kind", "length"]} if kind == "rate" else {}))
        candidates = [{"messages": said(text)} for text in answers]
        add_items(session, project, [NewItem("one", QUESTION, candidates)])
        item = session.query(Item).one()
        for number, verdict in enumerate(verdicts):
            labeler = ensure_labeler(session, f"labeler {number}")
            record(session, project, NewJudgement(item.id, labeler.id, verdict, 1.0, f"event {number}"))


def test_a_ranking_gives_each_answer_the_mean_of_its_comparisons(store: Store, tmp_path: Path) -> None:
    """a before b before c by one, b before a before c by another: a against b 0, both against c 1."""
    rankings = [((0,), (1,), (2,)), ((1,), (0,), (2,))]
    judged(store, "rank", ["a", "b", "c"], [Verdict(ranking=ranking) for ranking in rankings])
    assert released(store, tmp_path, "project:shop") == {"a": 0.5, "b": 0.5, "c": -1.0}


def test_a_comparison_gives_the_share_of_voices(store: Store, tmp_path: Path) -> None:
    """Three of four prefer a: 2 * 3/4 - 1."""
    a, b = Verdict(ranking=((0,), (1,))), Verdict(ranking=((1,), (0,)))
    judged(store, "compare", ["a", "b"], [a, a, b, a])
    assert released(store, tmp_path, "project:shop") == {"a": 0.5, "b": -0.5}


def test_ratings_and_edits(store: Store, tmp_path: Path) -> None:
    """kind 4 of 1 to 5 is 3/4 of the way: 2 * 3/4 - 1; length has no weight."""
    judged(store, "rate", ["a"], [Verdict(ratings={"kind": 4, "length": 1})])
    assert released(store, tmp_path, "project:shop") == {"a": 0.5}


def test_an_edit_is_worth_more_than_what_it_replaced(store: Store, tmp_path: Path) -> None:
    judged(store, "edit", ["a"], [Verdict(edit="better")])
    assert released(store, tmp_path, "project:shop") == {"better": 1.0, "a": -1.0}


def test_thumbs_are_about_the_answer_and_outcomes_about_the_conversation(store: Store, tmp_path: Path) -> None:
    before = [*QUESTION, *said("which order?"), {"role": "user", "content": "the last"}]
    with store.transaction() as session:
        for number, (text, prompt) in enumerate((("thumbed", before), ("solved", before), ("silent", before))):
            save_answer(
                session,
                Answer(id=str(number), customer="t", prompt=prompt, answer=text, consent=True, deployment="", model=""),
            )
        submit(session, "t", Event("e0", "0", "thumbs", "down"), STAFF)
        submit(session, "t", Event("e1", "1", "outcome", "ticket_solved"), STAFF)
    assert released(store, tmp_path, "feedback") == {"thumbed": -1.0, "solved": 1.0}
    rows = list(read_jsonl(next(tmp_path.glob("worth/*/train.jsonl")), Return))
    turns = {row.completion[-1].content: [turn.role for turn in row.completion] for row in rows}
    assert turns == {"thumbed": ["assistant"], "solved": ["assistant", "user", "assistant"]}


def test_files_of_any_judgement(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [
        Preference.model_validate({"prompt": QUESTION, "chosen": said("a"), "rejected": said("b"), "soft_label": 0.75}),
        Feedback.model_validate({"prompt": QUESTION, "completion": said("c"), "label": False}),
        Aspects.model_validate({"prompt": QUESTION, "completion": said("d"), "aspects": {"harm": 1, "kind": 5}}),
        Aspects.model_validate({"prompt": QUESTION, "completion": said("e"), "aspects": {"verbosity": 1}}),
        Return.model_validate({"prompt": QUESTION, "completion": said("f"), "reward": 7.5}),
    ]
    write_jsonl(path, rows)
    found = released(store, tmp_path / "out", str(path))
    assert found == {"a": 0.5, "b": -0.5, "c": -1.0, "d": 1.0, "f": 7.5}
    weighed = released(store, tmp_path / "again", str(path), aspects={"harm": -3, "kind": 1})
    assert weighed["d"] == 1.0
    worst = Aspects.model_validate({"prompt": QUESTION, "completion": said("d"), "aspects": {"harm": 5, "kind": 5}})
    assert [one.reward for one in returns_of(worst, Rule({"harm": -3, "kind": 1}))] == [-0.5]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reward": [1.0]}, "1 numbers for 2 assistant turns"),
        ({"reward": True}, "reward"),
        ({"reward": "much"}, "reward"),
        ({"completion": [{"role": "user", "content": "?"}]}, "begins with role 'user'"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    row = {"prompt": QUESTION, "completion": [*said("a"), *QUESTION, *said("b")], "reward": [1.0, 2.0], **change}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{reason}"):
        list(read_jsonl(path, Return))
    with pytest.raises(ValueError, match="finite"):
        Return.model_validate({**row, "completion": said("a"), "reward": float("inf")})


def test_columns_become_returns() -> None:
    """A question and its answer, or whole conversations, whose first answer is the first action."""
    form = table_format(ColumnMap({"prompt": "q", "answer": "a", "reward": "worth"}))
    (row,) = form.convert({"q": "why?", "a": "so", "worth": "0.5"}, ImportOptions())
    assert row_type_of(row) is form.row_type is Return
    assert Return.model_validate(row).rewards() == [0.5]
    form = table_format(ColumnMap({"messages": "turns", "reward": "worth"}))
    turns = [*QUESTION, *said("which?"), *QUESTION, *said("this")]
    (row,) = form.convert({"turns": turns, "worth": 2}, ImportOptions())
    read = Return.model_validate(row)
    assert (len(read.prompt), len(read.completion), read.rewards()) == (1, 3, [0.0, 2.0])
