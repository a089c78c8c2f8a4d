"""The short ways of large data sets decide as the long ones do."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from steersman.data.grouping import Groups
from steersman.data.pii import _NUMBER, Scrubber, _holds_number
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


@given(st.text(alphabet="aB 0123456789@.-+()/DE４x", max_size=40))
def test_a_row_that_is_passed_at_a_glance_holds_nothing_to_scrub(text: str) -> None:
    row = {"prompt": [{"role": "user", "content": text}], "note": text}
    scrubber = Scrubber()
    assert scrubber.scrub_row(row)["prompt"][0]["content"] == scrubber.scrub(text)


@given(st.text(alphabet="aZé“ß 09\u0663\u0966４５😀漢@.-+()/\u2013\u00a0", max_size=40))
def test_what_holds_no_number_at_a_glance_holds_none(text: str) -> None:
    assert _holds_number(text) is (_NUMBER.search(text) is not None)


def test_digits_of_every_script_are_seen_at_a_glance() -> None:
    for digit in filter(str.isdecimal, map(chr, range(sys.maxunicode))):
        assert _holds_number(f"é {digit * 8}")
        assert _holds_number(f"漢 DE{digit * 2}")


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
