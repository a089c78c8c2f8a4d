"""Running a labelling project: judgements in and out, settings with versions, adjudication, tenants, assignment."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from steersman.cli.data import app
from steersman.data.pii import PiiOptions
from steersman.data.records import Preference, read_jsonl
from steersman.data.rules import ReleaseOptions
from steersman.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from steersman.store import Store
from steersman.store.handing import next_task, progress
from steersman.store.interchange import export_judgements, import_judgements, write_judgements
from steersman.store.judging import (
    NewItem,
    NewJudgement,
    add_items,
    create_project,
    ensure_labeler,
    get_project,
    record,
    reopen_disputed,
)
from steersman.store.managing import assign, edit_project, find_items, get_item, place_of, resolve, retire, versions
from steersman.store.models import Item, ItemState, Judgement, Project
from steersman.store.releases import publish
from steersman.store.statistics import agreement_report
from steersman.store.verdicts import Verdict

A, B = Verdict(ranking=((0,), (1,))), Verdict(ranking=((1,), (0,)))
KINDS: dict[str, list[Verdict]] = {
    "compare": [Verdict(ranking=((0,), (1,)), strength=2, note="=1+1"), Verdict(ranking=((0, 1),)), Verdict(skip=True)],
    "rank": [Verdict(ranking=((2,), (0, 1))), Verdict(ranking=((0,), (1,), (2,)), unsafe=True)],
    "rate": [Verdict(ratings={"helpful": 4, "kind to all": 1}), Verdict(ratings={"helpful": 1, "kind to all": 5})],
    "edit": [Verdict(edit='Better,\nmuch "better"')],
}


def item(key: str, answers: int = 2, **more: Any) -> NewItem:
    candidates = [{"messages": [{"role": "assistant", "content": f"answer {n}"}]} for n in range(answers)]
    return NewItem(key, [{"role": "user", "content": f"Frage äöü {key}"}], candidates, **more)


def project_of(store: Store, kind: str = "compare", items: int = 4, name: str = "p", **settings: Any) -> Project:
    with store.transaction() as session:
        aspects = ["helpful", "kind to all"] if kind == "rate" else []
        project = create_project(session, name, kind, aspects=aspects, **settings)
        count = {"compare": 2, "rank": 3}.get(kind, 1)
        add_items(session, project, [item(f"q{n}", count) for n in range(items)])
        return project


def said(store: Store, name: str = "p") -> set[str]:
    with store.reading() as session:
        rows = export_judgements(session, get_project(session, name))
        return {json.dumps({k: v for k, v in row.items() if k != "event_id"}, sort_keys=True) for row in rows}


# --- judgements in and out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("kind", KINDS)
def test_judgements_leave_and_come_back_with_labeler_and_time(
    store: Store, tmp_path: Path, kind: str, ending: str
) -> None:
    from steersman.data.sources import read_records

    project = project_of(store, kind)
    with store.transaction() as session:
        ids = session.scalars(sa.select(Item.id).order_by(Item.id)).all()
        for name in ("ann", "bob"):
            labeler = ensure_labeler(session, name)
            for item_id, verdict in zip(ids, KINDS[kind], strict=False):
                record(session, project, NewJudgement(item_id, labeler.id, verdict, 12.5))
    before = said(store)
    path = tmp_path / f"judgements.{ending}"
    with store.reading() as session:
        assert write_judgements(export_judgements(session, project), path, project.aspects) == 2 * len(KINDS[kind])
    project_of(store, kind, name="again")
    rows: list[Any] = [record.data for record in read_records(path)]  # event ids are those of the first project
    for _ in range(2):
        with store.transaction() as session:
            taken = import_judgements(session, get_project(session, "again"), rows)
        assert (taken.new + taken.there_already, taken.left_out) == (2 * len(KINDS[kind]), {})
    assert taken.new == 0, "the same file again changes nothing"
    assert said(store, "again") == before


def test_equal_votes_are_kept_and_unknown_people_are_several(store: Store) -> None:
    project_of(store)
    rows: list[dict[str, Any]] = [{"item": "q0", "value": "a"}] * 3 + [{"item": "q0", "value": "b", "labeler": "ann"}]
    wrong = [
        {"item": "none", "value": "a"},
        {"item": "q1", "value": "maybe"},
        {"item": "q1", "value": "a", "time": "x"},
        {"item": "q1", "value": "a", "time": 2026},
        {"item": "q1", "value": "a", "seconds": "nan"},
    ]
    with store.transaction() as session:
        taken = import_judgements(session, get_project(session, "p"), [*rows, *wrong])
    assert taken.new == 4
    assert [reason.split(";")[0] for reason in taken.left_out] == [
        "item 'none' is not in project 'p'", "value is 'maybe'", "time is 'x'", "time is 2026", "seconds is no number",
    ]  # fmt: skip
    with store.reading() as session:
        report = agreement_report(session, get_project(session, "p"))
    assert report.judgements == 4
    assert report.questions[0].raw == pytest.approx(3 / 6)


def test_aspects_have_names_of_their_own(store: Store) -> None:
    for aspects in (["tone", "tone"], ["tone", " "]):
        with store.transaction() as session, pytest.raises(InvalidArgumentError, match="a name of its own"):
            create_project(session, "p", "rate", aspects=aspects)


def test_a_teams_own_file_is_taken_over_by_command(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    store = Store.open(url)
    project_of(store)
    table = tmp_path / "ours.csv"
    table.write_text(
        "id;who;choice;when\nq0;ann;left;2026-03-04T10:00:00+01:00\nq0;bob;left;1772614800000\nq1;ann;equal;\n"
    )
    names = [f"--column={part}={column}" for part, column in
             (("item", "id"), ("labeler", "who"), ("value", "choice"), ("time", "when"))]  # fmt: skip
    meaning = ["--value=a=left", "--value=b=right", "--value=tie=equal"]
    result = CliRunner().invoke(app, ["import-judgements", "p", str(table), *names, *meaning, "--store", url])
    assert "3 judgements added to p, 0 were there already" in result.output
    target = tmp_path / "out.csv"
    assert CliRunner().invoke(app, ["export-judgements", "p", str(target), "--store", url]).exit_code == 0
    rows = list(csv.DictReader(target.open(newline="")))
    said = [(row["item"], row["labeler"], row["value"]) for row in rows]
    assert said == [("q0", "ann", "a"), ("q0", "bob", "a"), ("q1", "ann", "tie")]
    assert {row["time"][:19] for row in rows[:2]} == {"2026-03-04T09:00:00"}
    wrong = CliRunner().invoke(app, ["import-judgements", "p", str(table), "--store", url])
    assert wrong.exit_code != 0
    assert "3 x no item is named" in wrong.output


# --- settings ---------------------------------------------------------------------------------------------------


def test_settings_change_with_versions_and_judgements_say_which(store: Store) -> None:
    project_of(store, overlap=2)

    def judge(name: str) -> None:
        with store.transaction() as session:
            found = get_project(session, "p")
            labeler = ensure_labeler(session, name)
            task = next_task(session, found, labeler)
            assert task is not None
            record(session, found, NewJudgement(task.item.id, labeler.id, A, 1.0))

    judge("ann")
    with store.transaction() as session:
        project = get_project(session, "p")
        assert edit_project(session, project, "olga", guidelines="Be fair.", overlap=3) == 2
        assert edit_project(session, project, "olga", overlap=3) == 2, "nothing changed"
        for wrong in ({"overlap": 0}, {"kind": "rate"}):
            with pytest.raises(InvalidArgumentError):
                edit_project(session, project, "olga", **wrong)
    judge("bob")
    with store.reading() as session:
        project = get_project(session, "p")
        assert [(v.version, v.settings["overlap"], v.by) for v in versions(session, project)] == [
            (2, 3, "olga"),
            (1, 2, ""),
        ]
        assert session.scalars(sa.select(Judgement.project_version).order_by(Judgement.id)).all() == [1, 2]
        assert session.scalar(sa.select(sa.func.sum(Item.open_slots))) == 4 * 3 - 2


# --- adjudication and search ------------------------------------------------------------------------------------


def test_what_was_decided_is_released_and_asked_no_more(store: Store, tmp_path: Path) -> None:
    project = project_of(store, items=3, overlap=3)
    with store.transaction() as session:
        ids = session.scalars(sa.select(Item.id).order_by(Item.id)).all()
        for name, verdict in (("ann", A), ("bob", B)):
            for item_id in ids:
                record(session, project, NewJudgement(item_id, ensure_labeler(session, name).id, verdict, 1.0))
        assert len(find_items(session, project, state="disputed")) == 3
        resolve(session, project, get_item(session, project, ids[0]), B, "olga")
        resolve(
            session, project, get_item(session, project, ids[1]), Verdict(ranking=((0,), (1,)), unsafe=True), "olga"
        )
        with pytest.raises(InvalidArgumentError, match="only an item that is no honeypot is decided"):
            resolve(session, project, get_item(session, project, ids[2]), Verdict(skip=True), "olga")
        assert [len(find_items(session, project, state=state)) for state in ("disputed", "resolved", "all")] == [
            1,
            2,
            3,
        ]
        assert reopen_disputed(session, project) == 1
        assert next_task(session, project, ensure_labeler(session, "cem")).item.id == ids[2]  # type: ignore[union-attr]
    options = ReleaseOptions(name="d", sources=("project:p",), pii=PiiOptions(entities=()), splits={"train": 1.0})
    release, _ = publish(store, options, tmp_path)
    (row,) = read_jsonl(Path(release.url, "train.jsonl"), Preference)
    assert row.chosen[0].content == "answer 1"
    assert release.card["left out"]["flagged unsafe"] == 1
    with store.transaction() as session:
        resolve(session, project, get_item(session, project, ids[0]), None, "olga")
        assert len(find_items(session, project, state="resolved")) == 1


def test_items_are_found_by_their_words(store: Store) -> None:
    project = project_of(store, items=12)
    with store.transaction() as session:
        add_items(session, project, [item("50%_off")])
        for text, count in (
            ("ÄÖÜ q1", 3),
            ("äöü q11", 1),
            ("answer 1", 13),
            ("%_", 1),
            ("none", 0),
            ("", 13),
            ("a\0b", 0),
        ):
            assert len(find_items(session, project, text=text.lower() if text[0:1] == "Ä" else text)) == count, text


@pytest.mark.parametrize("state", ["all", "judged", "disputed", "open"])
def test_pages_of_items_follow_one_another(store: Store, state: ItemState) -> None:
    project = project_of(store, items=9, overlap=2)
    with store.transaction() as session:
        ids = session.scalars(sa.select(Item.id).order_by(Item.id)).all()
        people = [ensure_labeler(session, name).id for name in ("ann", "bob")]
        for item_id, verdicts in ((ids[7], (A, B)), (ids[3], (A, B)), (ids[5], (A, A)), (ids[1], (A,))):
            for who, verdict in zip(people, verdicts, strict=False):
                record(session, project, NewJudgement(item_id, who, verdict, 1.0))
        whole = find_items(session, project, state=state)
        found, after = [], None
        while page := find_items(session, project, state=state, after=after, limit=2):
            found += page
            after = place_of(page[-1])
    numbers = [ids.index(item.id) for item in found]
    assert found == whole
    assert numbers == {
        "all": [3, 7, 0, 1, 2, 4, 5, 6, 8], "judged": [3, 7, 1, 5], "disputed": [3, 7], "open": [0, 1, 2, 4, 6, 8]
    }[state]  # fmt: skip


def test_items_are_found_by_whose_they_are(store: Store) -> None:
    project = project_of(store, items=2)
    with store.transaction() as session:
        add_items(session, project, [item(f"m{n}", meta={"end_customer": f"p{n % 2}"}) for n in range(3)])
        for whose, keys in (("p0", ["m0", "m2"]), ("p1", ["m1"]), ("P0", []), ("p", []), ("p0\0", ["m0", "m2"])):
            assert [found.key for found in find_items(session, project, end_customer=whose)] == keys, whose
        assert [found.key for found in find_items(session, project, end_customer="p0", text="m2")] == ["m2"]


# --- people -----------------------------------------------------------------------------------------------------


def test_assigned_items_come_first_and_stay(store: Store) -> None:
    import datetime as dt

    from steersman.store.handing import release_stale

    project = project_of(store, overlap=1)
    with store.transaction() as session:
        ann = ensure_labeler(session, "ann")
        ids = session.scalars(sa.select(Item.id).order_by(Item.id.desc()).limit(2)).all()
        assert assign(session, project, ann, ids) == 2
        assert assign(session, project, ann, ids) == 0
        release_stale(session, project, dt.timedelta(0))
        bob = ensure_labeler(session, "bob")
        assert progress(session, project, bob).left == 2
        for _ in ids:
            task = next_task(session, project, ann)
            assert task is not None
            assert task.item.id in ids
            record(session, project, NewJudgement(task.item.id, ann.id, A, 1.0))


def test_a_retired_labeler_judges_no_more_and_can_be_forgotten(store: Store) -> None:
    project = project_of(store, overlap=2)
    with store.transaction() as session:
        ann, bob = (ensure_labeler(session, name) for name in ("ann", "bob"))
        for labeler in (ann, bob):
            for _ in range(2):
                task = next_task(session, project, labeler)
                assert task is not None
                record(session, project, NewJudgement(task.item.id, labeler.id, A, 1.0))
        next_task(session, project, ann)
        before = session.scalar(sa.select(sa.func.sum(Item.open_slots)))
        assert retire(session, ann) == 0
        assert session.scalar(sa.select(sa.func.sum(Item.open_slots))) == before + 1
        with pytest.raises(PermissionDeniedError, match="'ann' was retired"):
            ensure_labeler(session, "ann")
        assert agreement_report(session, project).judgements == 4
        assert retire(session, ann, forget=True) == 2
        report = agreement_report(session, project)
        assert (report.judgements, report.questions) == (2, [])
        assert session.scalar(sa.select(sa.func.sum(Item.open_slots))) == before + 3


def test_tenants_see_their_own_items_and_people(store: Store) -> None:
    with store.transaction() as session:
        shared = create_project(session, "shared", "compare", overlap=1)
        add_items(session, shared, [item("acme 1", customer="acme"), item("bolt 1", customer="bolt"), item("free")])
        own = create_project(session, "acme's", "compare", customer="acme")
        add_items(session, own, [item("bolt 2", customer="bolt")])
        people = {tenant: ensure_labeler(session, "ann", tenant) for tenant in ("acme", "bolt")}
        assert people["acme"].id != people["bolt"].id, "one name, two people"
        assert len(find_items(session, own, tenant="acme")) == 1, "a project of one's own is seen whole"
        assert find_items(session, own, tenant="bolt") == []
        with pytest.raises(NotFoundError):
            get_item(session, own, find_items(session, own)[0].id, "bolt")
        seen = {tenant: progress(session, shared, who, tenant).left for tenant, who in people.items()}
        assert seen == {"acme": 2, "bolt": 2}
        judged: dict[str, set[str]] = {"acme": set(), "bolt": set()}
        for tenant, who in people.items():
            while (task := next_task(session, shared, who, tenant=tenant)) is not None:
                judged[tenant].add(task.item.key)
                record(session, shared, NewJudgement(task.item.id, who.id, A, 1.0))
        assert judged == {"acme": {"acme 1", "free"}, "bolt": {"bolt 1"}}
        names = {figures.labeler for figures in agreement_report(session, shared, "bolt").labelers}
    assert names == {"ann", f"somebody else {people['acme'].id}"}
