"""Import of any JSON lines, JSON, CSV or Parquet file with a column map.

A map names, for each part of a row, the column that it comes from, or a template with columns in braces:

    prompt=question  answer=best_answer                         -> demonstration
    prompt=text                                                 -> prompt only
    prompt=q  chosen=good  rejected=bad  margin=strength        -> preference
    prompt=prompt  answer_a="response 1"  answer_b="response 2"
        winner=label  with winners a=0, b=1, tie=2              -> preference, ties left out
    prompt=q  answer=a  label=thumb                             -> feedback
    prompt=q  answer=a  aspects.helpfulness=score               -> aspects
    prompt=q  answer=a  reward=outcome                          -> return
    messages=turns  reward=outcome                              -> return of the whole conversation
    prompt=article  answer=summary  aspects.true=scores.consistency   (a field of an object)
    prompt="{0}\\nA. {1}\\nB. {2}"  answer=5  facts.answer=5      -> demonstration from a headerless CSV

`system=`, `id=`, `customer=`, `source=`, `licence=`, `consent=`, `facts.NAME=` and `meta.NAME=` may stand beside each
of them; consent and labels are read as `steersman.data.truth` says. A column that
holds a list of messages is taken as it is. Without a map the file's rows must already have the canonical shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steersman.data.chat_formats import trl
from steersman.data.format import Converted, Converter, Format, ImportOptions, Skip, message
from steersman.data.records import (
    ROW_TYPES,
    Aspects,
    Demonstration,
    Feedback,
    Preference,
    Prompt,
    Return,
    Row,
    row_type_of,
)
from steersman.data.returns import conversation
from steersman.errors import ConfigError, DataError, meant

_TARGETS = {
    "prompt", "system", "answer", "chosen", "rejected", "answer_a", "answer_b", "winner", "label", "margin", "reward",
    "id", "customer", "source", "licence", "consent", "messages",
}  # fmt: skip
_GROUPS = ("aspects.", "facts.", "meta.")
_NAMES = ("id", "customer", "source", "licence")
_JUDGED = (Preference, Feedback, Aspects, Return)


@dataclass(frozen=True)
class ColumnMap:
    """Where the parts of a row come from."""

    columns: Mapping[str, str]
    winners: Mapping[str, str] = field(default_factory=lambda: {"a": "a", "b": "b", "tie": "tie"})
    """For `winner`: the value that means a, b and tie."""

    def __post_init__(self) -> None:
        for target in self.columns:
            if target not in _TARGETS and not target.startswith(_GROUPS):
                known = ", ".join(sorted(_TARGETS)) + ", aspects.NAME, facts.NAME, meta.NAME"
                raise ConfigError(
                    f"column map: {target!r} is no part of a row; known are {known}{meant(target, _TARGETS)}"
                )
        self.row_type  # noqa: B018 - refuses a map that makes no row

    @property
    def row_type(self) -> type[Row]:
        """The row type that the mapped parts make."""
        have = set(self.columns)
        if "messages" in have:
            return Feedback if "label" in have else Return if "reward" in have else Demonstration
        if "prompt" not in have:
            raise ConfigError("column map: names no prompt; add prompt=COLUMN (or messages=COLUMN)")
        if {"chosen", "rejected"} <= have or {"answer_a", "answer_b", "winner"} <= have:
            return Preference
        if have & {"chosen", "rejected", "answer_a", "answer_b", "winner"}:
            raise ConfigError("column map: a preference needs chosen and rejected, or answer_a, answer_b and winner")
        if "answer" not in have:
            return Prompt
        if any(target.startswith("aspects.") for target in have):
            return Aspects
        if "reward" in have:
            return Return
        return Feedback if "label" in have else Demonstration


def table_format(columns: ColumnMap) -> Format:
    """The import format of a column map."""
    votes = columns.row_type in _JUDGED
    return Format("table", columns.row_type, _converter(columns), None, "any file with a column map", votes=votes)


def canonical_format(kind: str) -> Format:
    """Rows that already have the canonical shape of `kind`, or that of TRL's formats."""
    if kind not in ROW_TYPES:
        raise ConfigError(f"--rows: {kind!r} is no row type; known are {', '.join(ROW_TYPES)}{meant(kind, ROW_TYPES)}")
    row_type = ROW_TYPES[kind]

    def convert(record: dict[str, Any], options: ImportOptions) -> Converted:
        for row in trl(record, options):
            if isinstance(row, dict) and (found := row_type_of(row)) is not row_type:
                raise DataError(f"a row of type {found.__name__.lower()}, expected {kind}; import it on its own")
            yield row

    # Copies were taken out when the rows became canonical; what is equal now is meant to be.
    return Format("steersman", row_type, convert, None, "canonical rows", votes=True)


def _converter(columns: ColumnMap) -> Converter:
    parts = dict(columns.columns)
    row_type = columns.row_type

    def convert(record: dict[str, Any], options: ImportOptions) -> Converted:
        row: dict[str, Any] = {}
        for target in parts:
            group, dot, name = target.partition(".")
            if dot:
                value = _value(record, parts[target])
                if value is not None and value != "":
                    row_group = row.setdefault(group, {}) if group != "meta" else row
                    row_group[name] = float(value) if group == "aspects" else value
            elif target in _NAMES and _value(record, parts[target]) not in (None, ""):
                row[target] = str(_value(record, parts[target]))
            elif target == "consent":
                row[target] = _value(record, parts[target])
        if "messages" in parts:
            messages = _messages(_value(record, parts["messages"]), "user")
            if row_type is Demonstration:
                yield row | {"messages": messages}
            elif row_type is Return:
                yield row | conversation(messages) | {"reward": float(_value(record, parts["reward"]))}
            else:
                label = _value(record, parts["label"])
                yield row | {"prompt": messages[:-1], "completion": messages[-1:], "label": label}
            return
        prompt = _messages(_value(record, parts["prompt"]), "user")
        if parts.get("system") and _value(record, parts["system"]):
            prompt = [message("system", _value(record, parts["system"])), *prompt]
        answers: dict[str, Any] = {
            target: _messages(_value(record, parts[target]), "assistant")
            for target in ("answer", "chosen", "rejected", "answer_a", "answer_b")
            if target in parts
        }
        if row_type is Preference:
            yield _preference(record, columns, row | {"prompt": prompt}, answers)
        elif row_type is Demonstration:
            yield row | {"messages": prompt + answers["answer"]}
        elif row_type is Prompt:
            yield row | {"prompt": prompt}
        else:
            row |= {"prompt": prompt, "completion": answers["answer"]}
            if row_type is Feedback:
                row["label"] = _value(record, parts["label"])
            elif row_type is Return:
                row["reward"] = float(_value(record, parts["reward"]))
            yield row

    return convert


def _preference(
    record: dict[str, Any], columns: ColumnMap, row: dict[str, Any], answers: dict[str, Any]
) -> dict[str, Any] | Skip:
    if "winner" in columns.columns:
        value = str(_value(record, columns.columns["winner"])).strip()
        winner = next((side for side, name in columns.winners.items() if name == value), None)
        if winner == "tie":
            return Skip("tie")
        if winner is None:
            raise DataError(f"winner is {value!r}; expected one of {', '.join(columns.winners.values())}")
        order = ("answer_a", "answer_b") if winner == "a" else ("answer_b", "answer_a")
    else:
        order = ("chosen", "rejected")
    row |= {"chosen": answers[order[0]], "rejected": answers[order[1]]}
    if "margin" in columns.columns and _value(record, columns.columns["margin"]) not in (None, ""):
        row["margin"] = float(_value(record, columns.columns["margin"]))
    return row


def _value(record: dict[str, Any], source: str) -> Any:
    """A column's value, that of a field in it, or a template filled with columns. Raises KeyError for a missing one."""
    if source in record:
        return record[source]
    if "{" in source:
        return re.sub(r"\{([^{}]+)\}", lambda found: str(record[found[1]]), source)
    column, _, inner = source.partition(".")
    if inner and isinstance(record.get(column), dict):
        return _value(record[column], inner)
    raise KeyError(source)


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return value
    return [message(role, "" if value is None else str(value).strip())]
