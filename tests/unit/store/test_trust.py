"""What must hold before judgements and rows are believed: gates with enough behind them, nothing lost or let slip."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import sqlalchemy as sa

from steersman.candidates import choose
from steersman.data.agreement import (
    Thresholds,
    bootstrap_intervals,
    krippendorff_alpha,
    patterns_of,
    raw_agreement,
    share_interval,
)
from steersman.data.aspects import Rule, score
from steersman.data.pii import PiiOptions
from steersman.data.records import Aspects, Preference, read_jsonl
from steersman.data.rules import ReleaseOptions
from steersman.errors import DataError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from steersman.store import Store
from steersman.store.handing import next_task, progress
from steersman.store.judging import (
    NewItem,
    NewJudgement,
    add,
    add_items,
    create_project,
    ensure_labeler,
    get_project,
    honeypot_of_row,
    record,
)
from steersman.store.models import Assignment, Item, Judgement, Labeler, UnitPattern
from steersman.store.releases import Subject, allow_customer, delete_customer, holdings, publish
from steersman.store.statistics import agreement_report
from steersman.store.verdicts import Verdict

A, B = Verdict(ranking=((0,), (1,))), Verdict(ranking=((1,), (0,)))


def item(key: str, text: str = "", **more: Any) -> NewItem:
    answers = [{"messages": [{"role": "assistant", "content": f"{text}{n}"}]} for n in range(2)]
    return NewItem(key, [{"role": "user", "content": f"question {key}"}], answers, **more)


def judged(store: Store, labelers: int, items: int, common: int, **settings: Any) -> None:
    """A project in which every labeler judges `items` items alone, and all of them the first `common`."""
    with store.transaction() as session:
        project = create_project(session, "p", "compare", overlap=labelers, **settings)
        add_items(session, project, [item(str(n)) for n in range(items)])
        ids = session.scalars(sa.select(Item.id).order_by(Item.id)).all()
        for number in range(labelers):
            labeler = ensure_labeler(session, f"labeler {number}")
            for at, item_id in enumerate(ids):
                if at < common or at % labelers == number:
                    record(session, project, NewJudgement(item_id, labeler.id, A if at % 2 else B, 1.0))


def options(*sources: str, **changes: Any) -> ReleaseOptions:
    values = {"name": "d", "sources": sources, "pii": PiiOptions(entities=()), "splits": {"train": 1.0}} | changes
    return ReleaseOptions.model_validate(values)


def rows_of(folder: str, split: str = "train") -> list[Preference]:
    return list(read_jsonl(Path(folder, f"{split}.jsonl"), Preference))


# --- gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("demand", ["min_alpha", "min_fleiss", "min_raw_agreement"])
@pytest.mark.parametrize(("labelers", "common"), [(1, 0), (2, 1), (3, 4)])
def test_agreement_of_one_labeler_or_few_items_is_unknown(
    store: Store, demand: str, labelers: int, common: int, tmp_path: Path
) -> None:
    judged(store, labelers, items=100, common=common)
    with pytest.raises(FailedPreconditionError, match="two votes"):
        publish(store, options("project:p", thresholds=Thresholds(**{demand: 0.5})), tmp_path)


def test_a_few_common_items_of_two_labelers_are_enough_where_nobody_disagrees(store: Store, tmp_path: Path) -> None:
    judged(store, labelers=2, items=12, common=10)
    strict = Thresholds(min_alpha=0.8, min_fleiss=0.8, min_raw_agreement=0.9)
    assert publish(store, options("project:p", thresholds=strict), tmp_path)[1]
    with store.reading() as session:
        (question,) = agreement_report(session, get_project(session, "p")).questions
    assert (question.items, question.labelers) == (10, 2)
    assert question.intervals == dict.fromkeys(("raw", "alpha", "fleiss"), (1.0, 1.0))


def test_the_interval_is_that_of_drawing_items_anew() -> None:
    """Against resampling of the table itself, in which each item is a row."""
    import krippendorff

    draw = np.random.default_rng(3)
    table = draw.integers(0, 2, (40, 2)).astype(float)
    table[:25, 1] = table[:25, 0]
    items = {(pattern,): n for pattern, n in patterns_of(table.tolist()).items()}
    found = bootstrap_intervals(items, {"alpha": lambda sample: krippendorff_alpha(sample, "nominal")})
    again = [krippendorff.alpha(table[draw.integers(0, 40, 40)].T, level_of_measurement="nominal") for _ in range(2000)]
    assert found["alpha"] == pytest.approx(tuple(np.quantile(again, [0.025, 0.975])), abs=0.06)


def test_the_pairs_of_a_ranking_are_no_more_items_than_one(store: Store) -> None:
    """Twelve rankings of four answers, half of them disputed throughout, are 72 pairs and as unsure as 12 items."""
    agreed, disputed = ((0,), (1,), (2,), (3,)), ((3,), (2,), (1,), (0,))
    with store.transaction() as session:
        project = create_project(session, "p", "rank", overlap=2)
        answers = [{"messages": [{"role": "assistant", "content": str(n)}]} for n in range(4)]
        add_items(
            session, project, [NewItem(str(n), [{"role": "user", "content": str(n)}], answers) for n in range(12)]
        )
        ids = session.scalars(sa.select(Item.id).order_by(Item.id)).all()
        for name in ("ann", "bob"):
            who = ensure_labeler(session, name)
            for at, item_id in enumerate(ids):
                ranking = disputed if at % 2 and name == "bob" else agreed
                record(session, project, NewJudgement(item_id, who.id, Verdict(ranking=ranking), 1.0))
    with store.reading() as session:
        (question,) = agreement_report(session, get_project(session, "p")).questions
    assert (question.units, question.items, question.raw) == (72, 12, 0.5)
    as_items = share_interval(6, 12)
    assert as_items == (0.25, 0.75)
    assert question.intervals["raw"] == pytest.approx(as_items, abs=0.1)
    apart = {(((0.0, 2),),): 36, (((0.0, 1), (2.0, 1)),): 36}
    one_by_one = bootstrap_intervals(apart, {"raw": lambda sample: float(np.divide(*reversed(raw_agreement(sample))))})
    low, high = one_by_one["raw"]
    assert high - low < 0.3, "what the pairs would claim if each were drawn by itself"


@pytest.mark.parametrize(("right", "of", "asked"), [(4, 5, 0.7), (45, 60, 0.7)])
def test_honeypots_are_known_as_well_as_their_number_allows(
    store: Store, right: int, of: int, asked: float, tmp_path: Path
) -> None:
    def blocked(least: float) -> str:
        with pytest.raises(FailedPreconditionError) as caught:
            publish(store, options("project:p", thresholds=Thresholds(min_honeypot_accuracy=least)), tmp_path)
        return str(caught.value)

    with store.transaction() as session:
        project = create_project(session, "p", "compare", overlap=1)
        add_items(session, project, [item(str(n), expected=A) for n in range(of)] + [item("real")])
        ann = ensure_labeler(session, "ann")
        for at, item_id in enumerate(session.scalars(sa.select(Item.id).order_by(Item.id)).all()):
            record(
                session, project, NewJudgement(item_id, ann.id, A if at < right else B, 1.0, shown=[at % 2, 1 - at % 2])
            )
    assert f"honeypot accuracy is {right / of:.3f} with a 95% interval from" in blocked(asked)
    assert f"honeypot accuracy is {right / of:.3f}, at least 0.9 is asked" in blocked(0.9)
    assert publish(store, options("project:p", thresholds=Thresholds(min_honeypot_accuracy=0.4)), tmp_path)[1]


def test_a_bias_of_the_order_is_ruled_out_by_many_comparisons_only(store: Store, tmp_path: Path) -> None:
    judged(store, labelers=1, items=8, common=8)
    fair = options("project:p", thresholds=Thresholds(max_order_bias=0.2))
    with pytest.raises(
        FailedPreconditionError, match=r"first wins is 0\.500 with a 95% interval from .*, 0\.3 to 0\.7 is"
    ):
        publish(store, fair, tmp_path)
    with store.transaction() as session:
        project = get_project(session, "p")
        add_items(session, project, [item(f"more {n}") for n in range(60)])
        who = ensure_labeler(session, "labeler 0")
        for at, item_id in enumerate(session.scalars(sa.select(Item.id).order_by(Item.id)).all()[8:]):
            record(session, project, NewJudgement(item_id, who.id, A if at % 2 else B, 1.0))
    assert publish(store, fair, tmp_path)[1]


def test_rankings_counted_by_pair_are_counted_by_item_after_an_update(store: Store) -> None:
    def counts() -> list[tuple[str, int]]:
        with store.reading() as session:
            rows = session.execute(sa.select(UnitPattern.pattern, UnitPattern.n).where(UnitPattern.n > 0))
            return sorted((row.pattern, row.n) for row in rows)

    with store.transaction() as session:
        project = create_project(session, "p", "rank", overlap=2)
        answers = [{"messages": [{"role": "assistant", "content": str(n)}]} for n in range(3)]
        add_items(session, project, [NewItem(str(n), [{"role": "user", "content": str(n)}], answers) for n in range(2)])
        for item_id in session.scalars(sa.select(Item.id)).all():
            for name, ranking in (("ann", ((0,), (1,), (2,))), ("bob", ((1,), (0,), (2,)))):
                who = ensure_labeler(session, name)
                record(session, project, NewJudgement(item_id, who.id, Verdict(ranking=ranking), 1.0))
    assert counts() == [("0:1,2:1|0:2|0:2", 2)]
    store.migrate("0006")
    assert counts() == [("0:1,2:1", 2), ("0:2", 4)]
    store.migrate()
    assert counts() == [("0:1,2:1|0:2|0:2", 2)]


# --- ratings ----------------------------------------------------------------------------------------------------

NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def rated(text: str, values: tuple[float, ...], **more: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "How do I cancel order 5?"}],
        "completion": [{"role": "assistant", "content": text}],
        "aspects": dict(zip(NAMES, values, strict=True)),
        "scales": dict.fromkeys(NAMES, (0, 4)),
    } | more


def test_a_short_right_answer_beats_a_long_wrong_one(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "rated.jsonl"
    short, long = rated("short and right", (4, 4, 4, 0, 0)), rated("long and wrong", (1, 1, 3, 4, 4))
    path.write_bytes(b"\n".join(map(orjson.dumps, (short, long))))

    def released(**changes: Any) -> Preference:
        (row,) = rows_of(publish(store, options(str(path), **changes), tmp_path / "releases")[0].url)
        return row

    assert released().chosen[0].content == "short and right"
    # By hand: (1 + 1 + 1) / 3 against (1/4 + 1/4 + 3/4) / 3, in steps of a scale of five.
    assert released().margin == pytest.approx(4 * (1 - 5 / 12))
    assert released(name="wordy", aspects={"verbosity": 1.0}).chosen[0].content == "long and wrong"
    assert released(name="terse", aspects={"verbosity": -1.0}).chosen[0].content == "short and right"
    assert score(long, NAMES, {}) == pytest.approx(4 * 5 / 12)


def test_what_must_hold_first_outweighs_everything_else(store: Store, tmp_path: Path) -> None:
    """By hand, on scales 0 to 4: the right answer misses no limit, the helpful one misses correctness by 2 of 4."""
    path = tmp_path / "rated.jsonl"
    right, helpful = rated("right", (1, 3, 1, 0, 1)), rated("helpful", (4, 1, 4, 0, 4))
    path.write_bytes(b"\n".join(map(orjson.dumps, (right, helpful))))

    def released(**changes: Any) -> Preference:
        (row,) = rows_of(publish(store, options(str(path), **changes), tmp_path / "releases")[0].url)
        return row

    weights = {"helpfulness": 1.0, "correctness": 1.0, "verbosity": -1.0}
    assert released(name="sum", aspects={"helpfulness": 1.0, "correctness": 1.0}).chosen[0].content == "helpful"
    first = released(name="first", aspects=weights, decide="threshold", limits={"correctness": 3})
    assert first.chosen[0].content == "right"
    summed = 4 * (1 / 4 + 3 / 4 - 1 / 4) / 3
    assert first.margin == pytest.approx(1 + 1 / (1 + np.exp(-summed)) - np.exp(-2 / 4))
    terse = {"verbosity": 1.0, "correctness": 4.0}  # of an aspect that harms, the most; both miss the second
    both = released(name="both", aspects=weights, decide="lexicographic", limits=terse)
    assert both.chosen[0].content == "right"
    assert both.margin == pytest.approx(1 + np.exp(-1 / 4) - np.exp(-3 / 4))
    unrated = options(str(path), decide="threshold", limits={"safety": 3})
    with pytest.raises(DataError, match="safety has a limit, but no row rates it; the rows rate coherence, complexity"):
        publish(store, unrated, tmp_path / "releases")
    with pytest.raises(DataError, match="helpfulnes has a weight, but no row rates it"):
        publish(store, options(str(path), aspects={"helpfulnes": 1, "correctness": 1}), tmp_path / "releases")
    for wrong in ({"decide": "threshold"}, {"limits": {"correctness": 3}}, {"aspects": {"correctness": float("nan")}}):
        with pytest.raises(ValueError, match=r"limits|finite"):
            options(str(path), **wrong)


@pytest.mark.parametrize("decide", ["threshold", "lexicographic"])
def test_a_release_orders_answers_as_a_reward_model_of_the_same_rule_does(decide: Any) -> None:
    """On two scales, since neither may let the longer one count for more."""
    import torch

    from steersman.config.manifest import AspectThreshold
    from steersman.nn.reward import Aspect, RewardSettings, decided

    draw = np.random.default_rng(5)
    scales = {"safety": (0, 1), "help": (1, 9), "verbosity": (0, 4)}
    weights, limit = {"safety": 1.0, "help": 2.0, "verbosity": -1.0}, ("safety", 0.5)
    ratings = np.stack([draw.uniform(low, high, 60) for low, high in scales.values()], 1).astype(np.float32)
    spreads = {name: Aspect(weight=weights[name], low=low, steps=high - low) for name, (low, high) in scales.items()}
    # The spread of 1 scale makes both sums the same; what differs between data sets is how far apart, never the order.
    settings = RewardSettings(
        objective="aspects",
        aspects={name: aspect.model_copy(update={"std": aspect.steps}) for name, aspect in spreads.items()},
        decide=decide,
        thresholds=[AspectThreshold(aspect=limit[0], limit=limit[1])],
    )
    learned = decided(settings, torch.from_numpy(ratings)).numpy()
    rule = Rule(weights, decide, dict([limit]))
    rows = [{"aspects": dict(zip(scales, map(float, row), strict=True)), "scales": scales} for row in ratings]
    released = [rule.value(row, scales) for row in rows]
    assert np.argsort(learned).tolist() == np.argsort(released).tolist()  # type: ignore[arg-type]
    summed = RewardSettings(objective="aspects", aspects=spreads)
    weighed = ratings @ [aspect.step_weight for aspect in summed.aspects.values()]
    assert np.argsort(weighed).tolist() == np.argsort([score(row, scales, weights) for row in rows]).tolist()


def test_a_refusal_keeps_a_rated_answer_out_of_every_pair(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "rated.jsonl"
    rows = [rated("a", (4, 4, 4, 0, 0)), rated("b", (3, 3, 3, 0, 0), consent="no"), rated("c", (1, 1, 1, 0, 0))]
    path.write_bytes(b"\n".join(map(orjson.dumps, [*rows, rated("d", (0, 0, 0, 0, 0), customer="other")])))
    release, _ = publish(store, options(str(path)), tmp_path / "releases")
    assert [(row.chosen[0].content, row.rejected[0].content) for row in rows_of(release.url)] == [("a", "c")]
    assert release.card["left out"] == {"no consent": 1, "only one rated answer to the prompt": 1}


def test_honeypots_know_the_scale_of_their_ratings() -> None:
    row = Aspects.model_validate(rated("a", (4, 2, 0, 1, 3)))
    assert honeypot_of_row(row).expected == Verdict(ratings=dict(zip(NAMES, (5, 3, 1, 2, 4), strict=True)))


# --- nothing is lost --------------------------------------------------------------------------------------------


def test_items_of_one_key_and_other_content_are_told_apart_and_counted(store: Store) -> None:
    with store.transaction() as session:
        project = create_project(session, "p", "compare")
        first = add(session, project, [item("1"), item("2")])
        again = add(session, project, [item("1"), item("2", "other "), item("2", "third "), item("2", "other ")])
        once_more = add(session, project, [item("2", "other ")])
        assert session.scalar(sa.select(sa.func.count(Item.id))) == 4
    assert (first.new, first.describe()) == (2, "")
    assert (again.new, again.there_already, again.told_apart) == (2, 2, 2)
    assert (once_more.new, once_more.describe()) == (0, "1 are there already")


def test_equal_and_opposite_votes_of_a_file_are_all_released(store: Store, tmp_path: Path) -> None:
    turns = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "q"}], "id": "r1"} | turns
    swapped = row | {"chosen": turns["rejected"], "rejected": turns["chosen"], "id": "r3"}
    path = tmp_path / "raters.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, (row, row, swapped))))
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
    release, _ = publish(store, options(str(path), str(tmp_path / "copy.jsonl")), tmp_path / "releases")
    assert release.card["splits"] == {"train": 3}
    assert release.card["left out"] == {"duplicate": 3}, "what another source holds, too, is a copy"


def test_candidates_of_two_models_are_one_of_each() -> None:
    found = [{"target": target, "n": n} for target in ("a:1", "b:2") for n in range(2)]
    assert choose(found, 2) == [{"n": 0}, {"n": 0}]
    assert choose(found[:2], 2) == [{"n": 0}, {"n": 1}]
    assert [candidate["n"] for candidate in choose(found[:3], 4)] == [0, 0, 1]


def test_one_side_of_a_split_can_be_split_again(store: Store, tmp_path: Path) -> None:
    from steersman.data.splits import Splits

    shares = {"train": 0.8, "test": 0.2}
    made = [
        {"prompt": [{"role": "user", "content": f"q{n}"}]}
        | {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        for n in range(400)
    ]
    imported = Splits(shares, salt="import")
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(row) for row in made if imported.of(row) == "train"))
    first, _ = publish(store, options(str(path), splits=shares), tmp_path / "releases")
    second, _ = publish(store, options(f"{first.url}/train.jsonl", splits=shares), tmp_path / "releases")
    third, _ = publish(store, options(f"{second.url}/train.jsonl", splits=shares), tmp_path / "releases")
    for release in (first, second, third):
        share = release.card["splits"]["test"] / release.card["rows"]
        assert 0.1 < share < 0.3
        assert release.card["empty splits"] == []


# --- deletion ---------------------------------------------------------------------------------------------------


def test_a_misspelt_tenant_is_not_deleted_and_a_block_can_be_lifted(store: Store, tmp_path: Path) -> None:
    judged(store, labelers=2, items=4, common=4)
    with store.transaction() as session:
        project = get_project(session, "p")
        add_items(session, project, [item("acme's", customer="acme")])
        assert holdings(session, Subject("acme")).items == 1
    with pytest.raises(NotFoundError, match=r"'acne': nothing is stored of it; check the name, known are 'acme'"):
        delete_customer(store, "acne")
    assert delete_customer(store, "acme").items == 1
    assert delete_customer(store, "acme").items == 0, "repeating goes on where it stopped"
    path = tmp_path / "new.jsonl"
    turns = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "q"}], "customer": "acme"} | turns
    path.write_bytes(orjson.dumps(row))
    with pytest.raises(FailedPreconditionError, match="tenant deleted"):
        publish(store, options(str(path)), tmp_path / "releases")
    with store.transaction() as session:
        assert allow_customer(session, "acme") == 2
        with pytest.raises(NotFoundError, match="is not blocked"):
            allow_customer(session, "acme")
    assert publish(store, options(str(path)), tmp_path / "releases")[1]


def test_a_card_names_labelers_only_when_asked(store: Store, tmp_path: Path) -> None:
    judged(store, labelers=2, items=10, common=10)
    quiet, _ = publish(store, options("project:p"), tmp_path)
    assert "labeler 0" not in orjson.dumps(quiet.card).decode()
    named, _ = publish(store, options("project:p", name="named", name_labelers=True), tmp_path)
    assert {figures["labeler"] for figures in named.card["agreement"]["p"]["labelers"]} == {"labeler 0", "labeler 1"}


# --- many at once -----------------------------------------------------------------------------------------------


def at_once(count: int, work: Any) -> list[Any]:
    """Runs `work(n)` in as many threads, all let go together."""
    gate = threading.Barrier(count)

    def run(number: int) -> Any:
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_the_same_form_sent_often_at_once_is_stored_once(store: Store) -> None:
    with store.transaction() as session:
        project = create_project(session, "p", "compare")
        add_items(session, project, [item("1")])
        labeler = ensure_labeler(session, "ann")
        item_id = session.scalars(sa.select(Item.id)).one()

    def send(_: int) -> bool:
        with store.transaction() as session:
            found = get_project(session, "p")
            return record(session, found, NewJudgement(item_id, labeler.id, A, 1.0, event_id="same"))

    assert sorted(at_once(6, send)) == [False] * 5 + [True]
    with store.reading() as session:
        assert session.scalar(sa.select(sa.func.count(Judgement.id))) == 1


def test_a_new_labelers_tabs_hold_one_item_between_them(store: Store) -> None:
    with store.transaction() as session:
        project = create_project(session, "p", "compare")
        add_items(session, project, [item(str(n)) for n in range(20)])

    def open_tab(_: int) -> int:
        with store.transaction() as session:
            task = next_task(session, get_project(session, "p"), ensure_labeler(session, "new"))
            assert task is not None
            return task.item.id

    assert len(set(at_once(6, open_tab))) == 1
    with store.reading() as session:
        assert session.scalar(sa.select(sa.func.count(Labeler.id))) == 1
        assert session.scalar(sa.select(sa.func.count()).select_from(Assignment)) == 1


def test_the_same_files_added_at_once_are_added_once(store: Store) -> None:
    with store.transaction() as session:
        create_project(session, "p", "compare")

    def load(_: int) -> int:
        with store.transaction() as session:
            return add_items(session, get_project(session, "p"), [item(str(n)) for n in range(50)])

    assert sum(at_once(4, load)) == 50


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_text_that_no_database_keeps_is_refused_by_name(store: Store, text: str) -> None:
    with store.transaction() as session, pytest.raises(InvalidArgumentError, match="item '1': holds NUL"):
        add_items(session, create_project(session, "p", "compare"), [item("1", text)])


# --- honeypots --------------------------------------------------------------------------------------------------


def test_a_honeypot_moves_the_counter_as_any_other_task_and_stands_where_nobody_expects_it(store: Store) -> None:
    with store.transaction() as session:
        project = create_project(session, "p", "compare", overlap=1, honeypot_every=4)
        add_items(session, project, [item(f"item {n}") for n in range(24)])
        add_items(session, project, [item(f"trap {n}", "trap ", expected=A) for n in range(20)])
        labeler = ensure_labeler(session, "ann")
    places, seen = [], []
    for number in range(100):
        with store.transaction() as session:
            found = get_project(session, "p")
            task = next_task(session, found, labeler)
            figures = progress(session, found, labeler)
            seen.append((figures.done, figures.left))
            if task is None:
                break
            if task.item.honeypot:
                places.append(number)
            record(session, found, NewJudgement(task.item.id, labeler.id, A, 1.0))
    total = seen[-1][0]
    assert seen == [(done, total - done) for done in range(total + 1)]
    assert total == 24 + len(places)
    assert [place // 4 for place in places] == list(range(len(places))), "one in every round"
    assert len({place % 4 for place in places}) > 1
