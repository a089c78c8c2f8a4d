"""Releases: rules, thresholds, scrubbing, versions that never change, deletion of a tenant."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
import sqlalchemy as sa

from steersman.data.agreement import Thresholds
from steersman.data.pii import PiiOptions
from steersman.data.records import Aspects, Demonstration, Preference, read_jsonl
from steersman.data.rules import ReleaseOptions
from steersman.errors import ChecksumError, DataError, FailedPreconditionError, NotFoundError
from steersman.store import Store
from steersman.store.feedback import Event, save_answer, submit
from steersman.store.judging import (
    NewItem,
    NewJudgement,
    add_items,
    create_project,
    ensure_labeler,
    get_project,
    record,
)
from steersman.store.models import Answer, FeedbackEvent, Item, Judgement, ReleaseCustomer, ReleaseEndCustomer
from steersman.store.releases import Subject, delete_customer, get_release, publish, record_training, verify
from steersman.store.statistics import agreement_report
from steersman.store.verdicts import Verdict

NO_PII = PiiOptions(entities=())
events = itertools.count()


def options(*sources: str, **changes: Any) -> ReleaseOptions:
    values = {"name": "support", "sources": sources, "pii": NO_PII, "splits": {"train": 1.0}} | changes
    return ReleaseOptions.model_validate(values)


def item(key: str, *answers: str, **more: Any) -> NewItem:
    candidates = [{"messages": [{"role": "assistant", "content": text}]} for text in answers]
    return NewItem(key, [{"role": "user", "content": f"question {key}"}], candidates, **more)


def judge_all(store: Store, name: str, verdicts: dict[str, list[Verdict]]) -> None:
    """Each item's verdicts, one a labeler."""
    with store.transaction() as session:
        project = get_project(session, name)
        for key, given in verdicts.items():
            item_id = session.scalars(sa.select(Item.id).where(Item.key == key, Item.project_id == project.id)).one()
            for number, verdict in enumerate(given):
                labeler = ensure_labeler(session, f"labeler {number}")
                record(session, project, NewJudgement(item_id, labeler.id, verdict, 1.0, f"event {next(events)}"))


def compared(store: Store, verdicts: dict[str, list[Verdict]], **item_fields: dict[str, Any]) -> None:
    with store.transaction() as session:
        project = create_project(session, "shop", "compare")
        add_items(
            session,
            project,
            [item(key, f"first of {key}", f"second of {key}", **item_fields.get(key, {})) for key in verdicts],
        )
    judge_all(store, "shop", verdicts)


def rows(folder: str, row_type: Any = Preference, split: str = "train") -> list[Any]:
    return list(read_jsonl(Path(folder, f"{split}.jsonl"), row_type))


A, B, TIE = (Verdict(ranking=ranking) for ranking in (((0,), (1,)), ((1,), (0,)), ((0, 1),)))
STRONG_B = Verdict(ranking=((1,), (0,)), strength=3)


def test_a_ranking_becomes_all_pairs_with_margins(store: Store, tmp_path: Path) -> None:
    with store.transaction() as session:
        project = create_project(session, "shop", "rank")
        add_items(session, project, [item("q", "a", "b", "c", "d")])
    judge_all(store, "shop", {"q": [Verdict(ranking=((2,), (0,), (1, 3))), Verdict(ranking=((2,), (1,), (0,), (3,)))]})
    release, created = publish(store, options("project:shop"), tmp_path)
    assert created
    found = {(row.chosen[0].content, row.rejected[0].content): row.margin for row in rows(release.url)}
    # a and b: one labeler each way, at equal distance - a tie, dropped by the rule.
    assert found == {("c", "a"): 1.5, ("c", "b"): 1.5, ("c", "d"): 2.5, ("a", "d"): 1.0, ("b", "d"): 1.0}
    assert release.card["left out"] == {"tie": 1}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, {"clear": None, "split": None}),
        ({"disagreement": "soft"}, {"clear": None, "split": 2 / 3}),
        ({"disagreement": "drop"}, {"clear": None}),
        ({"disagreement": "soft", "ties": "keep"}, {"clear": None, "split": 2 / 3, "even": 0.5}),
        ({"min_margin": 2.0}, {"clear": None}),
    ],
)
def test_ties_and_disagreement_follow_the_rules(
    store: Store, tmp_path: Path, rules: dict[str, Any], expected: dict[str, float | None]
) -> None:
    compared(store, {"clear": [STRONG_B, STRONG_B, STRONG_B], "split": [B, B, A], "even": [TIE, A, B]})
    release, _ = publish(store, options("project:shop", **rules), tmp_path)
    found = {row.prompt[0].content.removeprefix("question "): row for row in rows(release.url)}
    assert {key: row.soft_label for key, row in found.items()} == {
        key: None if value is None else pytest.approx(value) for key, value in expected.items()
    }
    assert found["clear"].chosen[0].content == "second of clear"
    assert found["clear"].margin == 3.0
    if "split" in found:
        assert found["split"].chosen[0].content == "second of split"
        assert found["split"].margin == pytest.approx(1 / 3)


def test_unsafe_honeypots_consent_and_tenants_are_respected(store: Store, tmp_path: Path) -> None:
    unsafe = Verdict(ranking=((0,), (1,)), unsafe=True)
    compared(
        store,
        {"ok": [A], "unsafe": [A, unsafe], "trap": [A], "refused": [A], "acme": [A], "bolt": [A]},
        trap={"expected": A},
        refused={"consent": False},
        acme={"customer": "acme", "consent": True},
        bolt={"customer": "bolt"},
    )

    def keys(**rules: Any) -> set[str]:
        release, _ = publish(store, options("project:shop", name="d", **rules), tmp_path)
        return {row.id.split("#")[0] for row in rows(release.url)}

    assert keys() == {"item:ok", "item:acme", "item:bolt"}
    assert keys(customers=["acme"]) == {"item:ok", "item:acme"}
    assert keys(exclude_customers=["acme"]) == {"item:ok", "item:bolt"}
    assert keys(consent="given") == {"item:acme"}
    assert keys(min_judgements=1, customers=[]) == {"item:ok"}
    with store.reading() as session:
        left_out = get_release(session, "d", 1).card["left out"]
    assert left_out == {"flagged unsafe": 1, "no consent": 1}


def test_low_agreement_blocks_with_the_numbers_until_they_judge_again(store: Store, tmp_path: Path) -> None:
    keys = [f"q{n}" for n in range(20)]
    compared(store, {key: [A, B, A if n % 2 else B] for n, key in enumerate(keys)})
    strict = options("project:shop", thresholds=Thresholds(min_alpha=0.6, min_raw_agreement=0.8))
    with pytest.raises(FailedPreconditionError) as caught:
        publish(store, strict, tmp_path)
    with store.reading() as session:
        alpha = agreement_report(session, get_project(session, "shop")).questions[0].alpha
    assert alpha is not None
    assert f"shop: preference: alpha is {alpha:.3f}, at least 0.6 is asked" in str(caught.value)
    assert "raw agreement is 0.333, at least 0.8 is asked" in str(caught.value)
    assert list(tmp_path.rglob("*.jsonl")) == [], "nothing half-written"
    judge_all(store, "shop", {key: [A if n % 2 else B] * 3 for n, key in enumerate(keys)})
    release, created = publish(store, strict, tmp_path)
    assert created
    assert release.card["agreement"]["shop"]["questions"][0]["alpha"] == 1.0
    assert len(rows(release.url)) == 20


def test_the_same_again_is_the_same_version_and_more_is_the_next(store: Store, tmp_path: Path) -> None:
    compared(store, {"one": [A], "two": [B]})
    first, _ = publish(store, options("project:shop"), tmp_path)
    again, created = publish(store, options("project:shop"), tmp_path)
    assert (again.version, created) == (1, False)
    before = {path.name: path.read_bytes() for path in Path(first.url).iterdir()}
    judge_all(store, "shop", {"one": [A, B, B]})
    second, created = publish(store, options("project:shop"), tmp_path)
    assert (second.version, created) == (2, True)
    assert {path.name: path.read_bytes() for path in Path(first.url).iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "support").iterdir()) == ["v1", "v2"]


def test_a_changed_file_is_found(store: Store, tmp_path: Path) -> None:
    compared(store, {"one": [A]})
    release, _ = publish(store, options("project:shop"), tmp_path)
    verify(release)
    path = Path(release.url, "train.jsonl")
    assert path.stat().st_mode & 0o222 == 0, "released files are write-protected"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"question", b"Question"))
    with pytest.raises(ChecksumError, match=r"train\.jsonl: missing or changed"):
        verify(release)


def test_splits_keep_a_prompt_on_one_side_and_do_not_depend_on_the_order(store: Store, tmp_path: Path) -> None:
    lines = [
        {
            "prompt": [{"role": "user", "content": f"Question {n % 50}" if n % 2 else f"question  {n % 50}"}],
            "chosen": [{"role": "assistant", "content": f"good {n}"}],
            "rejected": [{"role": "assistant", "content": f"bad {n}"}],
        }
        for n in range(300)
    ]
    sides = []
    for name, ordered in (("up", lines), ("down", lines[::-1])):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"\n".join(map(orjson.dumps, ordered)))
        shares = {"train": 0.7, "test": 0.3}
        release, _ = publish(store, options(str(path), name=name, splits=shares), tmp_path / "out")
        sides.append(
            {
                split: {r.prompt[0].content.lower().split()[1] for r in rows(release.url, split=split)}
                for split in shares
            }
        )
    assert sides[0] == sides[1]
    assert not sides[0]["train"] & sides[0]["test"]
    assert 5 <= len(sides[0]["test"]) <= 25


def test_ratings_become_aspects_or_pairs(store: Store, tmp_path: Path) -> None:
    with store.transaction() as session:
        project = create_project(session, "rated", "rate", aspects=["helpful", "polite"])
        same = {"key": "x", "prompt": [{"role": "user", "content": "Where?"}]}
        for key, text in (("good", "Here."), ("bad", "No idea."), ("same", "There.")):
            answer = {"messages": [{"role": "assistant", "content": text}]}
            add_items(session, project, [NewItem(**(same | {"key": key, "candidates": [answer]}))])
    judge_all(
        store,
        "rated",
        {
            "good": [Verdict(ratings={"helpful": 5, "polite": 5}), Verdict(ratings={"helpful": 4, "polite": 4})],
            "bad": [Verdict(ratings={"helpful": 1, "polite": 2})],
            "same": [Verdict(ratings={"helpful": 5, "polite": 4})],
        },
    )
    aspects, _ = publish(store, options("project:rated", kind="aspects", name="a"), tmp_path)
    assert {row.completion[0].content: row.aspects for row in rows(aspects.url, Aspects)}["Here."] == {
        "helpful": 4.5,
        "polite": 4.5,
    }
    pairs, _ = publish(store, options("project:rated", name="p"), tmp_path)
    found = {(row.chosen[0].content, row.rejected[0].content): row.margin for row in rows(pairs.url)}
    assert found == {("Here.", "No idea."): 3.0, ("There.", "No idea."): 3.0}
    assert pairs.card["left out"] == {"tie": 1}
    with pytest.raises(DataError, match="aspects, preference and return"):
        publish(store, options("project:rated", kind="demonstration"), tmp_path)


def test_edits_become_demonstrations_and_pairs(store: Store, tmp_path: Path) -> None:
    with store.transaction() as session:
        project = create_project(session, "mend", "edit")
        add_items(session, project, [item("q", "Dunno.")])
    judge_all(store, "mend", {"q": [Verdict(edit="It is on its way."), Verdict(skip=True)]})
    shown, _ = publish(store, options("project:mend", kind="demonstration", name="d"), tmp_path)
    assert [message.content for message in rows(shown.url, Demonstration)[0].messages] == [
        "question q",
        "It is on its way.",
    ]
    pairs, _ = publish(store, options("project:mend", name="p"), tmp_path)
    assert [row.rejected[0].content for row in rows(pairs.url)] == ["Dunno."]


def test_personal_data_is_scrubbed_and_counted(store: Store, tmp_path: Path) -> None:
    with store.transaction() as session:
        project = create_project(session, "shop", "compare")
        private = item(
            "q",
            "Write to ann.lee@example.com or call +49 30 901820.",
            "Card 4111 1111 1111 1111, IBAN DE89 3704 0044 0532 0130 00, order 4711.",
            customer="acme",
        )
        add_items(session, project, [private])
    judge_all(store, "shop", {"q": [A]})
    release, _ = publish(store, options("project:shop", pii=PiiOptions()), tmp_path)
    row = rows(release.url)[0]
    assert row.chosen[0].content == "Write to <EMAIL> or call <PHONE>."
    assert row.rejected[0].content == "Card <CARD>, IBAN <IBAN>, order 4711."
    assert row.customer == "acme"
    assert release.card["scrubbed"] == {"<CARD>": 1, "<EMAIL>": 1, "<IBAN>": 1, "<PHONE>": 1}


def test_the_card_says_what_is_inside(store: Store, tmp_path: Path) -> None:
    compared(store, {"one": [A], "two": [B]}, one={"meta": {"licence": "CC-BY-NC-4.0"}, "customer": "acme"})
    release, _ = publish(store, options("project:shop"), tmp_path)
    card = orjson.loads(Path(release.url, "card.json").read_bytes())
    assert card["rows"] == 2
    assert card["licences"] == {"CC-BY-NC-4.0": 1, "not stated": 1}
    assert card["sources"] == {"project:shop": 2}
    text = Path(release.url, "README.md").read_text()
    assert release.digest in text
    assert "Mind the terms of CC-BY-NC-4.0" in text
    assert "acme" not in Path(release.url, "card.json").read_text() + text, "tenants are counted, not named"


def test_deleting_a_tenant_makes_a_new_version_and_names_the_models(store: Store, tmp_path: Path) -> None:
    compared(store, {"one": [A, A], "two": [B, A, B], "three": [A]}, one={"customer": "acme"}, two={"customer": "bolt"})
    with store.transaction() as session:
        save_answer(
            session,
            Answer(id="a1", customer="acme", consent=True, prompt=[{"role": "user", "content": "Hi"}], answer="Hello"),
        )
        submit(session, "acme", Event("e1", "a1", "edit", "Good day"))
    old, _ = publish(store, options("project:shop", "feedback"), tmp_path)
    other, _ = publish(store, options("project:shop", name="bolt-only", customers=["bolt"]), tmp_path)
    with store.transaction() as session:
        record_training(session, old, "run-7", "reward-model")
        record_training(session, old, "run-7", "reward-model")
        record_training(session, other, "run-8", "policy")
    kept = [line for line in Path(old.url, "train.jsonl").read_bytes().splitlines() if b'"acme"' not in line]
    report = delete_customer(store, "acme")
    assert report.new_versions == {"support": 2}
    assert report.withdrawn == ["support v1"]
    assert report.models == [{"release": "support v1", "run": "run-7", "model": "reward-model"}]
    assert (report.items, report.answers) == (1, 1)
    with store.reading() as session:
        new = get_release(session, "support")
        assert new.version == 2
        assert Path(new.url, "train.jsonl").read_bytes().splitlines() == kept
        assert new.card["replaces"] == 1
        verify(new)
        withdrawn = get_release(session, "support", 1)
        assert withdrawn.card == old.card, "what a version was stays known"
        with pytest.raises(NotFoundError, match="withdrawn"):
            verify(withdrawn)
        for table in (FeedbackEvent, Answer):
            assert session.scalar(sa.select(sa.func.count()).select_from(table)) == 0
        assert session.scalar(sa.select(sa.func.count()).select_from(Judgement)) == 4
        counted = agreement_report(session, get_project(session, "shop"))
        assert (counted.judgements, counted.questions[0].pairs) == (4, 3)
    assert not Path(old.url).exists()
    verify(other)
    assert delete_customer(store, "acme").withdrawn == []
    # A later import of the same tenant's rows is not released either.
    path = tmp_path / "late.jsonl"
    path.write_bytes(kept[0].replace(b'"bolt"', b'"acme"') + b"\n" + kept[-1])
    late, _ = publish(store, options(str(path), name="late"), tmp_path)
    assert late.card["left out"] == {"tenant deleted": 1}


def test_a_data_set_of_one_tenant_only_ends(store: Store, tmp_path: Path) -> None:
    compared(store, {"one": [A]}, one={"customer": "acme"})
    publish(store, options("project:shop"), tmp_path)
    assert delete_customer(store, "acme").new_versions == {"support": None}
    with store.reading() as session, pytest.raises(NotFoundError, match="release support does not exist"):
        get_release(session, "support")


def test_an_empty_release_says_why(store: Store, tmp_path: Path) -> None:
    compared(store, {"one": [TIE]})
    with pytest.raises(FailedPreconditionError, match=r"no row is left \(1 x tie\)"):
        publish(store, options("project:shop"), tmp_path)
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": [], "chosen": [], "rejected": []}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: prompt: empty list"):
        publish(store, options(str(path)), tmp_path)
    assert list(tmp_path.rglob("v*")) == []


def test_a_release_of_files_keeps_its_bytes(store: Store, tmp_path: Path) -> None:
    """The digest was taken before reading, looking for personal data and counting were made faster."""
    texts = (
        "Where is order 4711-0815?",
        "Ring +49 30 901820 “now”",
        "Wo ist ٠١٢٣٤٥٦٧٨٩, é?",
        "mail ada@example.org",
        "Why?",
    )
    lines = []
    for number in range(60):
        row: dict[str, Any] = {
            "prompt": [{"role": "user", "content": f"{number % 37}: {texts[number % 5]}"}],
            "chosen": [{"role": "assistant", "content": texts[number % 3]}],
            "rejected": [{"role": "assistant", "content": f"{texts[number % 4]} no"}],
            "id": f"r{number}",
            **({"licence": "MIT"} if number % 2 else {}),
            **({"customer": "acme", "end_customer": f"c{number % 3}"} if number % 3 else {}),
            **({"consent": "no" if number % 14 else "yes"} if number % 7 == 0 else {}),
            **({"facts": {"order": "4711-0815"}, "margin": 1} if number % 5 == 0 else {}),
        }
        lines.append(orjson.dumps(row) if number % 4 else json.dumps(row).encode())
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n".join(lines))
    asked = options(str(source), pii=PiiOptions(), splits={"train": 0.7, "test": 0.3})
    made, _ = publish(store, asked, tmp_path / "r")
    assert made.digest == "b194fdb9a860b561a9fd8f75aa41a673af432b80fe9f154c9fa4e48f383d147f"
    assert made.card["splits"] == {"test": 15, "train": 41}
    assert made.card["licences"] == {"MIT": 26, "not stated": 30}
    assert made.card["left out"] == {"no consent": 4}
    assert made.card["scrubbed"] == {"<EMAIL>": 25, "<PHONE>": 42}
    with store.reading() as session:
        assert {row.customer: row.rows for row in session.scalars(sa.select(ReleaseCustomer))} == {"acme": 37}
        people = {row.end_customer: row.rows for row in session.scalars(sa.select(ReleaseEndCustomer))}
        assert people == {"c1": 18, "c2": 19}


PAIR = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "So."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"end_customer": ["x"]},
        {"end_customer": {"id": 1}},
        {"end_customer": "x" * 65},
        {"customer": "x" * 201},
        {"prompt": [{"role": ["user"], "content": "Why?"}]},
    ],
)
def test_what_names_nobody_is_refused_by_row_and_field(store: Store, tmp_path: Path, wrong: dict[str, Any]) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(orjson.dumps(PAIR) + b"\n" + orjson.dumps(PAIR | wrong))
    with pytest.raises(DataError, match=f"rows.jsonl:2: {next(iter(wrong))}"):
        publish(store, options(str(source)), tmp_path / "r")


def test_an_end_customer_who_is_a_number_is_erased_by_it(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n".join(orjson.dumps(PAIR | {"customer": "acme", "end_customer": who}) for who in (7, 8)))
    publish(store, options(str(source)), tmp_path / "r")
    report = delete_customer(store, Subject("acme", "7"))
    assert report.new_versions == {"support": 2}
    with store.reading() as session:
        assert [row.end_customer for row in session.scalars(sa.select(ReleaseEndCustomer)) if row.release_id == 2] == [
            "8"
        ]
