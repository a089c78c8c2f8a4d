"""Assignment, verdicts, undo, and running counts that stay exact."""

from __future__ import annotations

import datetime as dt
import random
from collections import Counter, defaultdict
from itertools import combinations
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steersman.data.agreement import krippendorff_alpha, patterns_of
from steersman.data.records import Aspects, Feedback, Preference
from steersman.errors import ConflictError, InvalidArgumentError, NotFoundError
from steersman.store import Store
from steersman.store.handing import next_task, progress, release_stale
from steersman.store.judging import (
    NewItem,
    NewJudgement,
    add_items,
    create_project,
    ensure_labeler,
    get_project,
    honeypot_of_row,
    record,
    record_many,
    reopen_disputed,
    undo,
)
from steersman.store.models import Assignment, Item, Judgement, Labeler, Project
from steersman.store.statistics import agreement_report, disputed_items
from steersman.store.verdicts import Verdict, votes

A_WINS, B_WINS, TIE = (Verdict(ranking=ranking) for ranking in (((0,), (1,)), ((1,), (0,)), ((0, 1),)))


def item(key: str, answers: int = 2, **more: Any) -> NewItem:
    candidates = [{"messages": [{"role": "assistant", "content": f"answer {n}"}]} for n in range(answers)]
    return NewItem(key, [{"role": "user", "content": key}], candidates, **more)


def setup_project(store: Store, items: int = 4, kind: str = "compare", **more: Any) -> tuple[Project, list[Labeler]]:
    with store.transaction() as session:
        project = create_project(session, "p", kind, **more)
        labelers = [ensure_labeler(session, name) for name in ("ann", "bob", "cem")]
        answers = {"compare": 2, "rank": 4}.get(kind, 1)
        add_items(session, project, [item(f"item {n}", answers) for n in range(items)])
    return project, labelers


def judge(store: Store, project: Project, labeler: Labeler, verdict: Verdict, seconds: float = 2.0) -> int | None:
    with store.transaction() as session:
        task = next_task(session, project, labeler)
        if task is None:
            return None
        record(session, project, NewJudgement(task.item.id, labeler.id, verdict, seconds))
        return task.item.id


def test_every_item_is_judged_by_as_many_labelers_as_asked(store: Store) -> None:
    project, labelers = setup_project(store, items=5, overlap=2)
    judged: dict[int, list[int]] = defaultdict(list)
    busy = True
    while busy:
        busy = False
        for labeler in labelers:
            found = judge(store, project, labeler, A_WINS)
            if found is not None:
                busy = True
                judged[found].append(labeler.id)
    assert {key: len(set(who)) for key, who in judged.items()} == dict.fromkeys(judged, 2)
    assert len(judged) == 5
    with store.reading() as session:
        assert [progress(session, project, labeler).left for labeler in labelers] == [0, 0, 0]


def test_a_task_stays_with_its_labeler_and_keeps_its_order(store: Store) -> None:
    project, (ann, bob, _) = setup_project(store, items=2, overlap=1)
    with store.transaction() as session:
        first = next_task(session, project, ann, random.Random(1))
    with store.transaction() as session:
        again = next_task(session, project, ann)
        other = next_task(session, project, bob)
    assert first is not None
    assert again is not None
    assert other is not None
    assert (again.item.id, again.shown) == (first.item.id, first.shown)
    assert other.item.id != first.item.id


def test_both_orders_occur_and_are_recorded(store: Store) -> None:
    project, (ann, *_) = setup_project(store, items=40, overlap=1)
    draw = random.Random(0)
    for _ in range(40):
        with store.transaction() as session:
            task = next_task(session, project, ann, draw)
            assert task is not None
            record(session, project, NewJudgement(task.item.id, ann.id, A_WINS, 1.0))
    with store.reading() as session:
        shown = Counter(tuple(row.shown) for row in session.scalars(sa.select(Judgement)))
        report = agreement_report(session, project)
    assert sum(shown.values()) == 40
    assert min(shown[0, 1], shown[1, 0]) > 10
    assert report.first_share == pytest.approx(shown[0, 1] / 40)


def test_honeypots_come_at_their_turn_and_measure_the_labeler(store: Store) -> None:
    project, (ann, *_) = setup_project(store, items=8, overlap=1, honeypot_every=3)
    with store.transaction() as session:
        add_items(session, project, [item(f"trap {n}", expected=A_WINS) for n in range(2)])
    turns = []
    for at in range(8):
        with store.transaction() as session:
            task = next_task(session, project, ann)
            assert task is not None
            turns.append(task.item.honeypot)
            record(session, project, NewJudgement(task.item.id, ann.id, A_WINS if at < 4 else B_WINS, 1.0))
    assert turns == [False, False, True, False, False, True, False, False]
    with store.reading() as session:
        report = agreement_report(session, project)
    assert (report.honeypots, report.honeypot_accuracy) == (2, 0.5)
    assert report.labelers[0].honeypot_accuracy == 0.5
    assert report.questions == []


def test_a_skipped_item_goes_to_somebody_else(store: Store) -> None:
    project, (ann, bob, _) = setup_project(store, items=1, overlap=1)
    assert judge(store, project, ann, Verdict(skip=True)) is not None
    assert judge(store, project, ann, A_WINS) is None
    assert judge(store, project, bob, A_WINS) is not None


def test_undo_gives_the_item_back_and_forgets_the_verdict(store: Store) -> None:
    project, (ann, bob, _) = setup_project(store, items=2, overlap=2)
    first = judge(store, project, bob, A_WINS)
    assert judge(store, project, ann, B_WINS) == first
    with store.transaction() as session:
        next_task(session, project, ann)  # a later open task is given back by the undo
    with store.transaction() as session:
        task = undo(session, project, ann)
    assert task is not None
    assert task.item.id == first
    with store.transaction() as session:
        assert next_task(session, project, ann).item.id == first  # type: ignore[union-attr]
        report = agreement_report(session, project)
        assert (report.judgements, report.questions) == (1, [])
    assert judge(store, project, ann, A_WINS) == first
    with store.reading() as session:
        report = agreement_report(session, project)
        assert report.questions[0].raw == 1.0
        assert session.scalar(sa.select(sa.func.count()).where(Judgement.undone_at.is_not(None))) == 1
    with store.transaction() as session:
        undo(session, project, ann)
        assert undo(session, project, ann) is None


def test_an_event_counts_once_and_never_for_two_verdicts(store: Store) -> None:
    project, (ann, *_) = setup_project(store)
    with store.transaction() as session:
        item_id = next_task(session, project, ann).item.id  # type: ignore[union-attr]
    first = NewJudgement(item_id, ann.id, A_WINS, 1.0, event_id="e1")
    for wanted in (True, False, False):
        with store.transaction() as session:
            assert record(session, project, first) is wanted
    with pytest.raises(ConflictError, match="another verdict"), store.transaction() as session:
        record(session, project, NewJudgement(item_id, ann.id, B_WINS, 1.0, event_id="e1"))
    with store.reading() as session:
        assert agreement_report(session, project).judgements == 1


def test_a_new_verdict_replaces_the_labelers_earlier_one(store: Store) -> None:
    project, (ann, bob, _) = setup_project(store, items=1, overlap=2)
    item_id = judge(store, project, ann, A_WINS)
    assert judge(store, project, bob, B_WINS) == item_id
    assert item_id is not None
    with store.transaction() as session:
        record(session, project, NewJudgement(item_id, bob.id, A_WINS, 1.0))
    with store.reading() as session:
        report = agreement_report(session, project)
        assert (report.judgements, report.questions[0].raw) == (2, 1.0)
        assert disputed_items(session, project) == []


def test_a_stale_assignment_goes_to_somebody_else(store: Store) -> None:
    project, (ann, bob, _) = setup_project(store, items=1, overlap=1)
    with store.transaction() as session:
        next_task(session, project, ann)
    assert judge(store, project, bob, A_WINS) is None
    with store.transaction() as session:
        session.execute(sa.update(Assignment).values(assigned_at=dt.datetime(2020, 1, 1, tzinfo=dt.UTC)))
    assert judge(store, project, bob, A_WINS) is not None
    with store.transaction() as session:
        assert release_stale(session, project) == 0


def test_verdicts_must_answer_the_question(store: Store) -> None:
    project, (ann, *_) = setup_project(store, kind="rate", aspects=["helpful", "polite"])
    with store.transaction() as session:
        item_id = next_task(session, project, ann).item.id  # type: ignore[union-attr]
    for verdict, reason in (
        (Verdict(ratings={"helpful": 3}), "rate each of helpful, polite"),
        (A_WINS, "rate each of"),
    ):
        with pytest.raises(InvalidArgumentError, match=reason), store.transaction() as session:
            record(session, project, NewJudgement(item_id, ann.id, verdict, 1.0))
    with pytest.raises(NotFoundError, match="item 999"), store.transaction() as session:
        record(session, project, NewJudgement(999, ann.id, Verdict(skip=True), 1.0))
    with pytest.raises(NotFoundError, match="project 'q'"), store.reading() as session:
        get_project(session, "q")
    with pytest.raises(InvalidArgumentError, match="3 answers; a compare project takes 2 to 2"):  # noqa: SIM117
        with store.transaction() as session:
            add_items(session, create_project(session, "c", "compare"), [item("x", 3)])


def test_disputed_items_are_asked_again_and_the_record_stays(store: Store) -> None:
    project, (ann, bob, cem) = setup_project(store, items=3, overlap=2)
    for labeler, verdicts in ((ann, (A_WINS, A_WINS, A_WINS)), (bob, (A_WINS, B_WINS, B_WINS))):
        for verdict in verdicts:
            judge(store, project, labeler, verdict)
    with store.transaction() as session:
        add_items(session, project, [item("trap", expected=A_WINS)])
        trap = session.scalars(sa.select(Item.id).where(Item.honeypot)).one()
        for labeler, verdict in ((ann, A_WINS), (bob, B_WINS)):
            record(session, project, NewJudgement(trap, labeler.id, verdict, 1.0))
    with store.transaction() as session:
        disputed = [found.id for found in disputed_items(session, project)]
        assert reopen_disputed(session, project, limit=1) == 1
        assert reopen_disputed(session, project) == 1
    assert len(disputed) == 2
    with store.reading() as session:
        report = agreement_report(session, project)
        assert (report.judgements, report.honeypots, report.questions[0].raw) == (4, 2, 1.0)
        assert disputed_items(session, project) == []
        assert session.scalar(sa.select(sa.func.count(Judgement.id))) == 8
        assert [progress(session, project, labeler).left for labeler in (ann, bob, cem)] == [2, 2, 2]
    assert {judge(store, project, labeler, A_WINS) for labeler in (ann, bob) for _ in range(2)} == set(disputed)
    with store.reading() as session:
        assert agreement_report(session, project).judgements == 8


def test_rows_with_a_judgement_become_honeypots(store: Store) -> None:
    question, answer = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    other = [{"role": "assistant", "content": "b"}]
    pair = Preference.model_validate({"prompt": question, "chosen": answer, "rejected": other})
    rated = Aspects.model_validate({"prompt": question, "completion": answer, "aspects": {"helpful": 4.6, "polite": 0}})
    assert honeypot_of_row(pair).expected == A_WINS
    assert honeypot_of_row(rated).expected == Verdict(ratings={"helpful": 5, "polite": 1})
    with pytest.raises(InvalidArgumentError, match="needs chosen and rejected"):
        honeypot_of_row(Feedback.model_validate({"prompt": question, "completion": answer, "label": True}))
    project, (ann, *_) = setup_project(store, items=0, honeypot_every=1)
    with store.transaction() as session:
        assert add_items(session, project, [honeypot_of_row(pair)]) == 1
        assert next_task(session, project, ann).item.honeypot  # type: ignore[union-attr]


def test_items_are_added_once(store: Store) -> None:
    project, _ = setup_project(store, items=3)
    with store.transaction() as session:
        assert add_items(session, project, [item("item 1"), item("item 9"), item("item 9")]) == 1


RANKINGS = [tuple((index,) for index in order) for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2))] + [
    ((0, 1), (2, 3)),
    ((2,), (0, 1, 3)),
]

steps = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["judge", "judge", "judge", "undo", "rejudge"]),
        st.sampled_from([Verdict(ranking=ranking) for ranking in RANKINGS] + [Verdict(skip=True)]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps)
def test_running_counts_equal_a_count_from_scratch(steps: list[tuple[int, str, Verdict]]) -> None:
    store = Store.open("sqlite://")
    project, labelers = setup_project(store, items=3, kind="rank", overlap=3)
    for who, action, verdict in steps:
        with store.transaction() as session:
            labeler = labelers[who]
            if action == "undo":
                undo(session, project, labeler)
            elif action == "rejudge":
                item_id = session.scalars(sa.select(Item.id)).first()
                assert item_id is not None
                record(session, project, NewJudgement(item_id, labeler.id, verdict, 1.0))
            elif task := next_task(session, project, labeler):
                record(session, project, NewJudgement(task.item.id, labeler.id, verdict, 1.0))
    with store.reading() as session:
        report = agreement_report(session, project)
        rows = session.scalars(sa.select(Judgement).where(Judgement.undone_at.is_(None))).all()
        assert_slots(session, project)
        assert_progress(session, project, labelers)
    units: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for row in rows:
        for vote in votes(row.verdict):
            units[row.item_id, vote.unit][row.labeler_id] = vote.value
    pairs = [(one, two) for cast in units.values() for one, two in combinations(cast.values(), 2)]
    assert report.judgements == sum(not row.verdict.get("skip") for row in rows)
    if not pairs:
        assert report.questions == []
        return
    found = report.questions[0]
    assert found.pairs == len(pairs) == sum(day.pairs for day in report.days)
    assert found.raw == pytest.approx(sum(one == two for one, two in pairs) / len(pairs))
    alpha = krippendorff_alpha(patterns_of([list(cast.values()) for cast in units.values()]), "nominal")
    assert found.alpha == (None if alpha is None else pytest.approx(alpha))
    assert sum(pair.units for pair in report.pairs) == len(pairs)


def assert_slots(session: Any, project: Project) -> None:
    for found in session.scalars(sa.select(Item)):
        taken = session.scalars(sa.select(Assignment.state).where(Assignment.item_id == found.id)).all()
        assert found.open_slots == project.overlap - sum(state != "skipped" for state in taken)
        assert found.judgements == sum(state == "judged" for state in taken)


def assert_progress(session: Any, project: Project, labelers: list[Labeler]) -> None:
    for labeler in labelers:
        mine = {
            row.item_id: row.state for row in session.scalars(sa.select(Assignment)) if row.labeler_id == labeler.id
        }
        items = session.scalars(sa.select(Item)).all()
        left = sum(mine.get(item.id, "open" if item.open_slots > 0 else "") == "open" for item in items)
        assert progress(session, project, labeler).left == left


def test_many_at_once_equal_one_by_one(store: Store) -> None:
    project, labelers = setup_project(store, items=12)
    draw = random.Random(3)
    with store.transaction() as session:
        ids = session.scalars(sa.select(Item.id).order_by(Item.id)).all()
        new = [
            NewJudgement(item_id, labeler.id, draw.choice([A_WINS, B_WINS, TIE]), 1.5, f"{item_id}-{labeler.id}")
            for item_id in ids
            for labeler in labelers
        ]
        assert record_many(session, project, new) == 36
        bulk = agreement_report(session, project)
    other = Store.open("sqlite://")
    single, _ = setup_project(other, items=12)
    for judgement in new:
        with other.transaction() as session:
            at = ids.index(judgement.item_id)
            mine = session.scalars(sa.select(Item.id).order_by(Item.id)).all()[at]
            record(session, single, NewJudgement(mine, judgement.labeler_id, judgement.verdict, 1.5))
    with other.reading() as session:
        assert agreement_report(session, single) == bulk
    with store.transaction() as session:
        assert record_many(session, project, new) == 0
