"""The short ways of large data sets decide as the long ones do."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from steersman.data.grouping import Groups
from steersman.data.pii import Scrubber, _holds_suspect
from steersman.data.plain import is_plain
from steersman.data.records import ROW_TYPES

CONVERSATIONS = {
    "demonstration": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "feedback": ("prompt", "completion"),
    "prompt": ("prompt",),
}
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "user", "system", "tool", "developer", ["user"]])},
    optional={"content": st.sampled_from(["", " ", "yes", "no"]), "name": st.just("ada")},
)
EXTRA = st.dictionaries(
    st.sampled_from(
        ["id", "source", "customer", "consent", "margin", "soft_label", "label", "facts", "tools", "at", "end_customer"]
    ),
    st.sampled_from([None, True, "no", 1, 0.5, -1.0, float("inf"), "x", {"a": None}, []]),
    max_size=3,
)


@given(kind=st.sampled_from(sorted(CONVERSATIONS)), data=st.data())
def test_a_plain_row_is_one_that_its_type_accepts_and_gives_back(kind: str, data: st.DataObject) -> None:
    row: dict[str, Any] = {name: data.draw(st.lists(TURN, max_size=3)) for name in CONVERSATIONS[kind]}
    row |= data.draw(EXTRA)
    if is_plain(row, kind):
        assert ROW_TYPES[kind].model_validate(row).to_dict() == row


@pytest.mark.parametrize("kind", sorted(CONVERSATIONS))
def test_an_ordinary_row_is_plain(kind: str) -> None:
    question, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    row: dict[str, Any] = {
        "messages": [question, answer],
        "prompt": [question],
        "chosen": [answer],
        "rejected": [{"role": "assistant", "content": "No."}],
        "completion": [answer],
    }
    row = {name: row[name] for name in CONVERSATIONS[kind]} | {"id": "1", "consent": True, "label": True, "at": 3}
    ROW_TYPES[kind].model_validate(row)
    assert is_plain(row, kind)
    assert not is_plain(row | {"facts": {"a": None}}, kind)


@pytest.mark.parametrize("kind", ["aspects", "unknown"])
def test_what_has_no_short_way_is_never_plain(kind: str) -> None:
    assert not is_plain({"prompt": [{"role": "user", "content": "Why?"}]}, kind)


PIECES = [
    "call ",
    "Tel. ",
    "order ",
    "DE",
    "+",
    "00",
    "(",
    ")",
    "12",
    "345",
    "4567890",
    " ",
    "-",
    "\n",
    ".",
    "@",
    "é ",
    "漢",
]
PIECES += [
    "4111 1111 1111 1111",
    "555-0123",
    "212",
    "+49 30 901820",
    "GB82 WEST 1234 5698 7654 32",
    "\u0663\u0966４５",
    "a",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_what_is_passed_at_a_glance_holds_nothing_to_scrub(text: str) -> None:
    scrubber = Scrubber()
    found = list(scrubber._spans(text))
    assert not found or scrubber._may_hold(text)
    row = {"prompt": [{"role": "user", "content": text}], "note": text}
    assert scrubber.scrub_row(row)["prompt"][0]["content"] == scrubber.scrub(text)


@pytest.mark.parametrize(
    ("text", "suspect"),
    [
        ("order 4711", False),
        ("order 12345678 of ticket 2024001", False),
        ("12345678901", False),
        ("411111111111", True),
        ("call 1234567", True),
        ("Call me under\n1234567", True),  # a line is not told from the next one at a glance
        ("+1234567", True),
        ("+(1234567", True),
        ("001234567", True),
        ("12 345 67", True),
        ("DE1234567", True),
        ("DE12", True),
    ],
)
def test_a_run_of_digits_alone_is_no_suspect(text: str, suspect: bool) -> None:
    assert _holds_suspect(text) is suspect
    assert _holds_suspect(f"é {text}") is suspect


def test_digits_of_every_script_are_seen_at_a_glance() -> None:
    for digit in filter(str.isdecimal, map(chr, range(128, sys.maxunicode))):
        assert _holds_suspect(f"é {digit * 8}")
        assert _holds_suspect(f"漢 DE{digit * 2}")


def test_iban_in_any_grouping_is_not_passed() -> None:
    for text in ("GB82WEST12345698765432", "GB82 WEST 1234 5698 7654 32", "mail ada@example.org", "+49 30 901820"):
        row = {"prompt": [{"role": "user", "content": text}]}
        assert Scrubber().scrub_row(row) != row


@pytest.mark.parametrize("held", [2, 1000])
def test_groups_are_whole_and_in_order_however_many_rows_are_held(held: int) -> None:
    rows = [{"key": f"k{number % 37}", "number": number} for number in range(200)]
    with Groups(lambda row: row["key"].encode(), held) as groups:
        for row in rows:
            groups.add(row)
        found = list(groups)
    assert sorted(group[0]["number"] for group in found) == list(range(37))
    for group in found:
        assert [row["number"] for row in group] == list(range(group[0]["number"], 200, 37))
    assert held == 2 or found[0][0]["number"] == 0


def test_wrong_rows_are_left_to_their_type() -> None:
    pair = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": [], "rejected": []}
    assert not is_plain(pair, "preference")
    with pytest.raises(ValidationError):
        ROW_TYPES["preference"].model_validate(pair)
