"""The short way for what nearly every row of a large data set is: two roles, two keys a turn, nothing to convert.

The types in `records` take as long over such a row as all the rest of an import or a release.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from steersman.data.truth import says_consent

#: Characters of the names of a tenant and of one of its customers.
MAX_TENANT, MAX_END_CUSTOMER = 200, 64

_CONVERSATIONS = {
    "demonstration": (("messages", "assistant"),),
    "preference": (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")),
    "feedback": (("prompt", "user"), ("completion", "assistant")),
    "prompt": (("prompt", "user"),),
}
_ANSWERS = frozenset({"chosen", "rejected", "completion"})
_TURN = ["role", "content"]
_ROLES = frozenset({"user", "assistant", "tool"})  # and a system turn at the front
Check = Callable[[Any], bool]
_FIELDS: dict[str, Check] = {
    **dict.fromkeys(("id", "source", "licence"), lambda value: type(value) is str),
    "customer": lambda value: type(value) is str and len(value) <= MAX_TENANT,
    "end_customer": lambda value: type(value) is str and len(value) <= MAX_END_CUSTOMER,
    **dict.fromkeys(("consent", "label"), lambda value: type(value) is bool),
    "margin": lambda value: type(value) is float and 0 <= value < math.inf,
    "soft_label": lambda value: type(value) is float and 0 <= value <= 1,
    **dict.fromkeys(("facts", "tools", "aspects", "scales"), lambda value: False),
}
_SCALARS = frozenset({str, int, float, bool})


@contextmanager
def seldom_collected() -> Iterator[None]:
    """While it lasts, garbage is looked for a hundred times less often: rows hold no cycles, and to look for some among
    them takes a twentieth of the time. Also a decorator."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def is_plain(row: Mapping[str, Any], kind: str) -> bool:
    """Whether the row type accepts a row for sure and gives it back as it is; False means: ask the type.

    Args:
        row: A row as read from JSON.
        kind: A name of `steersman.data.records.ROW_TYPES`.
    """
    conversations = _CONVERSATIONS.get(kind, ())
    for name, last_role in conversations:
        turns = row.get(name)
        if type(turns) is not list or not _is_plain_conversation(turns, last_role):
            return False
        if name in _ANSWERS and turns[0]["role"] != "assistant":
            return False
    if kind == "preference" and row["chosen"] == row["rejected"]:
        return False
    if kind == "demonstration" and all(turn["role"] != "user" for turn in row["messages"]):
        return False
    if kind == "feedback" and "label" not in row:
        return False
    return bool(conversations) and all(check(row[name]) for name, check in _checks(kind, tuple(row)))


def plain_text(row: Mapping[str, Any], but: Collection[str] = ()) -> str | None:
    """The texts of a row, one a line, `but` for some of its keys; None where the row holds more than turns of role and
    content, and scalars."""
    texts = []
    for name, value in row.items():
        if name in but:
            continue
        if type(value) is str:
            texts.append(value)
        elif type(value) is list:
            for turn in value:
                if type(turn) is not dict or list(turn) != _TURN:
                    return None
                texts.append(turn["content"])
        elif type(value) not in _SCALARS and value is not None:
            return None
    return "\n".join(texts)


def _is_plain_conversation(turns: list[Any], last_role: str) -> bool:
    if not turns:
        return False
    for turn in turns:
        if type(turn) is not dict or [*turn] != _TURN:
            return False
        role, text = turn.values()
        if type(role) is not str or type(text) is not str:
            return False
        if role not in _ROLES and (role != "system" or turn is not turns[0]):
            return False
    return role == last_role and text != "" and not text.isspace()


@lru_cache(maxsize=1024)
def _checks(kind: str, names: tuple[str, ...]) -> list[tuple[str, Check]]:
    """What the further fields of a row must pass: the rows of a file have the same ones."""
    own = {name for name, _ in _CONVERSATIONS[kind]}
    return [(name, _check_of(name)) for name in names if name not in own]


def _check_of(name: str) -> Check:
    if name in _FIELDS:
        return _FIELDS[name]
    scalar = says_consent(name) is None
    return lambda value: scalar and type(value) in _SCALARS
