"""What a message asks for, and what is taken out of logs and records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.redaction import redact
from services.gateway.tools.config import RecordKind
from services.gateway.tools.lookup import Wish, wants_human, wishes
from services.gateway.tools.odata import conditions, literal
from services.gateway.tools.records import NUMBER, Query, clean, query_for
from services.gateway.tools.tryton import domain

KIND = RecordKind(entity="Orders", number="No", owner="Owner", fields={"number": "No"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("where is my order 2?", [Wish("order", "2")]),
        ("Wo ist meine Bestellung SO-17?", [Wish("order", "SO-17")]),
        ("où est ma commande 4, et la facture 9 ?", [Wish("order", "4"), Wish("invoice", "9")]),
        ("¿cuándo llega el envío 12?", [Wish("delivery", "12")]),
        ("2023/0042 is the invoice I mean", [Wish("invoice", "2023/0042")]),
        ("is CHAIR-1 in stock", [Wish("stock", "CHAIR-1")]),
        ("what about #5?", [Wish("order", "5"), Wish("delivery", "5"), Wish("invoice", "5")]),
        ("what about my orders", [Wish("order", None)]),
        ("state of my order ３", [Wish("order", "3")]),
        ("show my data", [Wish("customer", None)]),
        ("hello there", []),
        ("write to a1@b2.com or v1.2.3", []),
    ],
)
def test_wishes(text: str, expected: list[Wish]) -> None:
    assert wishes(text, 5) == expected


@given(st.text(max_size=300))
def test_wishes_are_few_and_well_formed(text: str) -> None:
    found = wishes(text, 5)
    assert len(found) <= 5
    assert all(wish.number is None or NUMBER.match(wish.number) for wish in found)


@pytest.mark.parametrize("text", ["I want to talk to a human", "Kann ich mit einem Mitarbeiter sprechen?"])
def test_who_wants_a_person(text: str) -> None:
    assert wants_human(text)
    assert not wants_human("where is my order?")


@given(st.text(max_size=50), st.text(max_size=50))
def test_values_never_become_conditions(owner: str, number: str) -> None:
    query = Query(KIND, number, owner, 1)
    assert domain(query) == [["Owner", "=", owner], ["No", "=", number]]
    text = conditions(query)
    assert text == f"Owner eq {literal(owner)} and No eq {literal(number)}"
    # Inside a literal quotes come in pairs, so it ends where it should.
    assert literal(owner)[1:-1].replace("''", "").count("'") == 0


def test_no_query_for_owned_records_without_an_owner() -> None:
    assert query_for(KIND, "1", None, 3) is None
    assert query_for(KIND, "1", "", 3) is None
    free = RecordKind(entity="Products", number="No", owner=None, fields={"number": "No"})
    assert query_for(free, "1", "C-A", 3) == Query(free, "1", None, 3)


def test_records_are_cleaned() -> None:
    assert clean("a\u202eb\u200bc\x00d\nnext") == "a b c d next"
    assert len(clean("x" * 1000)) == 301
    assert clean({"a": ["x\ny", 1, None]}) == {"a": ["x y", 1, None]}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("mail jane.doe+x@example.co.uk now", "mail [e-mail] now"),
        ("call +49 170 1234567", "call [phone]"),
        ("card 4111 1111 1111 1111", "card [card]"),
        ("to DE89 3704 0044 0532 0130 00", "to [iban]"),
        ("sk-0123456789ab-" + "x" * 43, "[key]"),
        ("took 12.5 ms at 2026-11-21T10:00:00", "took 12.5 ms at 2026-11-21T10:00:00"),
        ("req-d0271258841d52fb085c7378", "req-d0271258841d52fb085c7378"),
    ],
)
def test_redaction(text: str, kept: str) -> None:
    assert redact(text) == kept
