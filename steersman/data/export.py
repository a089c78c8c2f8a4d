"""Rows out of the platform: JSONL, Parquet, and tasks for Label Studio.

Label Studio gets the conversations as lists of messages for its Paragraphs tag, the answers of a pair in an order
drawn by the row's hash, and what is known as an annotation; the import format `label-studio` reads the form back.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import orjson
from pydantic import ValidationError

from steersman.artifacts import storage_errors, whole_file
from steersman.data.label_studio import stars
from steersman.data.opening import display_name
from steersman.data.records import Message, Return, Row, describe_validation_error, row_type_of, write_jsonl
from steersman.data.sources import read_records
from steersman.data.splits import encode
from steersman.errors import ConfigError, DataError, meant

FORMATS = ("jsonl", "parquet", "label-studio")
_BATCH = 1000
_CONVERSATIONS = ("messages", "prompt", "chosen", "rejected", "completion")

_PARAGRAPHS = '<Paragraphs name="{name}" value="${name}" layout="dialogue" nameKey="role" textKey="content"/>'
_CONTROLS = {
    "demonstration": "",
    "preference": (
        '<Pairwise name="preference" toName="answer_1,answer_2"/>'
        + _PARAGRAPHS.format(name="answer_1")
        + _PARAGRAPHS.format(name="answer_2")
    ),
    "feedback": (
        _PARAGRAPHS.format(name="completion")
        + '<Choices name="label" toName="completion" choice="single" required="true">'
        + '<Choice value="good"/><Choice value="bad"/></Choices>'
    ),
    "prompt": '<TextArea name="answer" toName="prompt" rows="6"/>',
}


def export(source: str | os.PathLike[str], target: Path, form: str) -> int:
    """Writes the canonical rows of a JSONL or Parquet file in another form and returns their number.

    Raises DataError for a wrong row, ConfigError for an unknown form.
    """
    if form not in FORMATS:
        raise ConfigError(f"--to: {form!r} is no form of export; known are {', '.join(FORMATS)}{meant(form, FORMATS)}")
    with storage_errors(target):
        if form == "jsonl":
            return write_jsonl(target, read_any(source))[0]
        with whole_file(target) as partial:
            return (_write_parquet if form == "parquet" else _write_label_studio)(source, partial)


def read_any(source: str | os.PathLike[str]) -> Iterator[Row]:
    """Canonical rows of any type. Raises DataError with `file:line` at the first wrong one."""
    name = display_name(source)
    for record in read_records(source):
        if isinstance(record.data, DataError):
            raise record.data
        where = f"{name}:{record.line}"
        try:
            yield row_type_of(record.data).model_validate(record.data)
        except ValidationError as error:
            raise DataError(f"{where}: {describe_validation_error(error)}") from None
        except DataError as error:
            raise DataError(f"{where}: {error.message}") from None


def _write_parquet(source: str | os.PathLike[str], target: Path) -> int:
    """Lists of messages stay lists; what is neither text, number nor truth value is kept as JSON text.

    The file is read twice: once for the columns, once for the rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, set[type]] = {}
    for row in read_any(source):
        for name, value in row.to_dict().items():
            kinds.setdefault(name, set()).add(type(value))
    text, as_json = pa.string(), {b"steersman.encoding": b"json"}
    turn = pa.struct(dict.fromkeys(Message.model_fields, text))
    scalars = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: text}
    fields = []
    for name, found in kinds.items():
        if name in _CONVERSATIONS:
            fields.append(pa.field(name, pa.list_(turn)))
        elif found <= {int, float} and len(found) == 2:
            fields.append(pa.field(name, pa.float64()))
        elif len(found) == 1 and (kind := next(iter(found))) in scalars:
            fields.append(pa.field(name, scalars[kind]))
        else:
            fields.append(pa.field(name, text, metadata=as_json))
    schema = pa.schema(fields)
    json_columns = {field.name for field in fields if field.metadata}
    count = 0
    with pq.ParquetWriter(target, schema) as writer:
        rows = read_any(source)
        while batch := [_parquet_row(row.to_dict(), json_columns) for row in islice(rows, _BATCH)]:
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
    return count


def _parquet_row(row: dict[str, Any], json_columns: set[str]) -> dict[str, Any]:
    for name in json_columns & row.keys():
        row[name] = orjson.dumps(row[name]).decode()
    for name in _CONVERSATIONS:
        for message in row.get(name, ()):
            if "tool_calls" in message:
                message["tool_calls"] = orjson.dumps(message["tool_calls"]).decode()
    return row


def label_studio_config(row_type: type[Row], aspects: Iterable[str] = ()) -> str:
    """The labelling configuration (XML) that fits the tasks of a row type."""
    kind = row_type.__name__.lower()
    controls = _CONTROLS.get(kind, "")
    if kind == "aspects":
        controls = _PARAGRAPHS.format(name="completion") + "".join(
            f'<Rating name={quoteattr(aspect)} toName="completion" maxRating="5"/>' for aspect in aspects
        )
    shown = _PARAGRAPHS.format(name="messages" if kind == "demonstration" else "prompt")
    return f"<View>{shown}{controls}</View>"


def _write_label_studio(source: str | os.PathLike[str], target: Path) -> int:
    """A JSON array of tasks, written row by row."""
    count = 0
    with open(target, "wb") as sink:
        sink.write(b"[")
        for row in read_any(source):
            sink.write((b",\n" if count else b"\n") + orjson.dumps(label_studio_task(row)))
            count += 1
        sink.write(b"\n]\n")
    return count


def label_studio_task(row: Row) -> dict[str, Any]:
    """One task with the row's judgement as its annotation."""
    if isinstance(row, Return):
        raise DataError("a return has no form in Label Studio; export such rows as jsonl or parquet")
    data = row.to_dict()
    results: list[dict[str, Any]] = []
    if "chosen" in data:
        # A fixed side for the better answer would teach labelers and models the side.
        swap = encode(data)[1] % 2 == 1
        better, worse = data.pop("chosen"), data.pop("rejected")
        data["answer_1"], data["answer_2"] = (worse, better) if swap else (better, worse)
        results.append(_result("preference", "answer_1", "pairwise", {"selected": "right" if swap else "left"}))
    if "label" in data:
        choice = "good" if data.pop("label") else "bad"
        results.append(_result("label", "completion", "choices", {"choices": [choice]}))
    # The exact ratings stay in the data: stars are whole.
    for aspect, value in data.get("aspects", {}).items():
        results.append(
            _result(aspect, "completion", "rating", {"rating": stars(value, data.get("scales", {}).get(aspect))})
        )
    return {"data": data, "annotations": [{"result": results}] if results else []}


def _result(name: str, to: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"from_name": name, "to_name": to, "type": kind, "value": value}
