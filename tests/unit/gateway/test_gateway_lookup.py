"""What a message asks for, and what is taken out of logs and records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.redaction import redact
from services.gateway.systems.base import Query, RecordKind
from services.gateway.systems.odata import conditions, literal
from services.gateway.systems.tryton import domain
from services.gateway.tools.reading import Reader, Wish
from services.gateway.tools.records import NUMBER, clean, query_for

READER = Reader()
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
    assert READER.wishes(text, 5) == expected


@pytest.mark.parametrize(
    "text",
    [
        "order No2",
        "order №2",
        "pedido nº2",
        "order-2",
        "order_2?",
        "Bestellung Nr.2",
        "order no.2",
        "order nos. 2",
        "commande n°2",
        "ORDER NUMBER：２",
        "my order number is 2.",
        "order (#2)",
        "order-no-2",
        "order\u200b 2\ufe0f",
        "Wo bleibt meine Bestellung mit der Nummer 2?",
        "Où en est ma commande 2 ?",
        "¿Dónde está mi pedido número 2?",
        "Dov'è il mio ordine n. 2?",
        "Waar is mijn bestelling 2?",
        "Onde está a minha encomenda 2?",
        "Gdzie jest moje zamówienie nr 2?",
        "Kde je objednávka č. 2",
        "objednávka č.2",
        "Var är min beställning 2",
        "siparişim 2 nerede",
        "Где мой заказ №2?",
        "أين طلبي ٢؟",
        "我的订单2在哪里？",
        "订单号：2 现在什么状态",
        "注文番号2はどうなっていますか",
        "注文２の状況を教えて",
        "주문 2 어디에 있나요",
        "I paid 39.80 on 26.11., ref 4711, phone 0151 2345678, where is order 2",
        "order 2: I paid 39,80 € on 2026-11-26 at 10:30 for 3 chairs with 19% VAT, call +49 30 1234567",
        "1 2 3 4 5 6 7 8 9 are my lucky numbers, where is order 2",
        "x " * 3000 + "where is order 2" + " y" * 1500,
    ],
)
def test_the_order_comes_first_however_it_is_written(text: str) -> None:
    assert READER.wishes(text, 5)[0] == Wish("order", "2")


def test_all_numbers_of_a_message_are_looked_up_within_the_bound() -> None:
    numbers = [wish.number for wish in READER.wishes("my orders 1, 2, 17 and SO-5, please", 10)]
    assert sorted(filter(None, numbers)) == ["1", "17", "2", "SO-5"]


def test_systems_say_how_their_numbers_and_words_look() -> None:
    reader = Reader({"order": ["Vorgang"]}, {"order": ["AB[0-9]{4}"], "invoice": ["RE-[0-9]+"]})
    assert reader.wishes("Vorgang ab1234 und RE-7, 5 Stück", 5)[:2] == [
        Wish("order", "ab1234"),
        Wish("invoice", "RE-7"),
    ]
    # What does not look like an order's number is not looked up as one.
    assert Wish("order", "12") not in reader.wishes("order 12", 5)
    # No pattern of an operator's makes the reading slow.
    slow = Reader({}, {"order": ["(a+)+b"]})
    assert slow.wishes("order " + "a" * 38 + "1", 5) == [Wish("order", None)]


@pytest.mark.parametrize("pattern", ["(", "(?=a)b"])
def test_a_pattern_that_is_none_is_refused_at_the_start(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a pattern"):
        RecordKind(entity="Orders", number="No", owner="Owner", fields={"number": "No"}, numbers=[pattern])


@given(st.text(max_size=300))
def test_wishes_are_few_and_well_formed(text: str) -> None:
    found = READER.wishes(text, 5)
    assert len(found) <= 5
    assert all(wish.number is None or NUMBER.match(wish.number) for wish in found)


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
