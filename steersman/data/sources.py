"""Reading foreign data files as a stream of records with their line numbers.

A record that cannot be read comes as a `DataError` in place of the record, and reading goes on behind it wherever
the format allows that; only damage ends a file, with an `IncompleteFileError`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from steersman.data.json_array import Broken, exact_decimal, loads_exactly, objects
from steersman.data.opening import (
    DATA_FILES,
    STDIN,
    UNREADABLE,
    Position,
    archive_of,
    display_name,
    ending,
    open_bytes,
)
from steersman.data.records import MAX_LINE_BYTES, IncompleteFileError, damaged, describe_json_error, lines_of
from steersman.errors import DataError, meant

_CHUNK = 1 << 20
_CSV_HEAD = 1 << 16
#: Digits and points to 0, the rest to blanks: sixteen 0 in a row are a number that a double may not hold.
_DIGITS = bytes(ord("0") if chr(byte) in "0123456789." else ord(" ") for byte in range(256))
_LONG_NUMBER = b"0" * 16
_NO_CSV: tuple[type[Exception], ...] = (csv.Error, *UNREADABLE)
_SEPARATORS = (",", ";", "\t", "|")


class Record(NamedTuple):
    """One record of a file."""

    line: int
    """First line of the record (CSV, JSON), or the row's number from 1 (Parquet, Hugging Face)."""
    data: dict[str, Any] | DataError


def read_records(
    path: str | os.PathLike[str],
    *,
    header: bool = True,
    separator: str | None = None,
    encoding: str | None = None,
    position: Position | None = None,
) -> Iterator[Record]:
    """Streams the records of a .jsonl, .json (array), .csv, .tsv or .parquet file, packed or not.

    Args:
        path: Local path, fsspec URL, or `-` for standard input, whose format is told by its first bytes.
        header: CSV only; False names the columns "0", "1", ...
        separator: CSV only; None tells it from the first lines: comma, semicolon, tab or bar.
        encoding: Of text that is neither UTF-8 nor marked, as "cp1252".
        position: Follows the reading, for a progress bar.
    """
    name = display_name(path)
    with open_bytes(path, position, encoding) as stream:
        if archive := archive_of(stream):
            formats = ", ".join(DATA_FILES)
            yield Record(1, DataError(f"{name}:1: the file is {archive}; unpack it, or save its rows as {formats}"))
            return
        kind = ending(path)
        if os.fspath(path) == STDIN or kind not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"):
            kind = _kind_by_content(stream, kind)
        if kind == ".parquet":
            yield from _read_parquet(stream, name)
        elif kind in (".csv", ".tsv"):
            yield from _read_csv(stream, name, "\t" if kind == ".tsv" else separator, header)
        elif kind == ".json":
            yield from _read_json(stream, name)
        else:
            yield from _read_jsonl(stream, name)


def _kind_by_content(stream: io.BufferedReader, kind: str) -> str:
    try:
        head = stream.peek(_CSV_HEAD).lstrip(b"\xef\xbb\xbf \t\r\n")
    except UNREADABLE:
        return ".jsonl"
    if head.startswith(b"PAR1"):
        return ".parquet"
    if head.startswith(b"["):
        return ".json"
    return ".csv" if not kind and head and not head.startswith(b"{") else ".jsonl"


def _read_jsonl(stream: IO[bytes], name: str) -> Iterator[Record]:
    for number, line in lines_of(stream, name):
        yield Record(number, line if isinstance(line, DataError) else _parse_object(line, f"{name}:{number}"))


def _parse_object(line: bytes, where: str) -> dict[str, Any] | DataError:
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return DataError(f"{where}: {describe_json_error(error, line)}")
    if orjson.dumps(data) == line.rstrip():  # all of it was read: no number was rounded, no field stands twice
        return _require_object(data, where)
    if _LONG_NUMBER in line.translate(_DIGITS) and _has_float(data):
        try:  # orjson rounds what a double cannot hold
            data = loads_exactly(line)
        except ValueError as error:
            return DataError(f"{where}: not valid JSON ({error}); mend or remove the line")
    if type(data) is dict and any(line.count(b'"%b":' % name.encode()) > 1 for name in data):
        try:  # orjson keeps the last of two values of one name
            json.loads(line, object_pairs_hook=_unique)
        except ValueError as error:
            return DataError(f"{where}: {error}")
    return _require_object(data, where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"field {twice!r} stands twice in one object; give each a name of its own")
    return found


def _has_float(data: Any) -> bool:
    if type(data) is dict:
        return any(_has_float(value) for value in data.values())
    if type(data) is list:
        return any(_has_float(value) for value in data)
    return type(data) is float


def _require_text(data: dict[str, Any] | DataError, where: str) -> dict[str, Any] | DataError:
    """Refuses a record with bytes that were not UTF-8, and with numbers that JSON cannot carry."""
    try:
        orjson.dumps(None if isinstance(data, DataError) else data)
    except TypeError as error:
        reason = (
            "not UTF-8; save the file as UTF-8, or name its encoding with --encoding"
            if "surrogates" in str(error)
            else f"{error}; mend the row"
        )
        return DataError(f"{where}: {reason}")
    return data


def _require_object(data: Any, where: str) -> dict[str, Any] | DataError:
    if isinstance(data, dict):
        return data
    return DataError(f"{where}: a JSON {type(data).__name__}, expected an object; mend or remove the row")


def _read_json(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """The objects of one top-level JSON array, held in memory one at a time.

    A file whose first character is no bracket is read as JSON lines, which many data sets call .json.
    """
    try:
        head = stream.peek(_CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not head.startswith(b"["):
            yield from _read_jsonl(stream, name)
            return
        text = _decoded(stream)
        buffer = text.read(_CHUNK)
    except UNREADABLE as error:
        yield Record(1, damaged(name, 1, error))
        return
    for line, data in objects(text, buffer, MAX_LINE_BYTES):
        where = f"{name}:{line}"
        if isinstance(data, Broken):
            kind = IncompleteFileError if data.last else DataError
            yield Record(line, kind(f"{name}:{data.line}: {data.reason}"))
        else:
            yield Record(line, _require_text(_require_object(data, where), where))


def _decoded(stream: IO[bytes]) -> IO[str]:
    """UTF-8 text with bytes that are not UTF-8 kept as surrogates, so that a reader can name their row."""
    return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")


def _read_csv(stream: io.BufferedReader, name: str, separator: str | None, header: bool) -> Iterator[Record]:
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        head = stream.peek(_CSV_HEAD)
        text = _decoded(stream)
        if head.removeprefix(b"\xef\xbb\xbf").startswith(b"sep="):  # Excel's own way of naming it
            separator = separator or text.readline().strip()[4:5]
        reader = csv.reader(text, delimiter=separator or _separator(head))
        columns = [column.strip() for column in next(reader, [])] if header else None
    except _NO_CSV as error:
        yield Record(1, damaged(name, 1, error))
        return
    twice = [column for column, count in Counter(columns or ()).items() if count > 1]
    if twice:
        yield Record(1, DataError(f"{name}:1: column {twice[0]!r} stands twice; give each column a name of its own"))
        return
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield Record(line, DataError(f"{name}:{line}: not valid CSV ({error}); mend or remove the row"))
            continue
        except UNREADABLE as error:
            yield Record(line, damaged(name, line, error))
            return
        if values is None:
            return
        if values:
            columns = columns or [str(index) for index in range(len(values))]
            yield Record(line, _csv_record(columns, values, f"{name}:{line}"))


def _separator(head: bytes) -> str:
    """The first separator that cuts the first lines into the same number of columns, more than one; else a comma."""
    text = head.decode(errors="replace")
    lines = text.splitlines(keepends=True)
    whole = lines if len(head) < _CSV_HEAD or len(lines) < 2 else lines[:-1]
    for separator in _SEPARATORS:
        try:
            widths = {len(row) for row in csv.reader(whole[:50], delimiter=separator) if row}
        except csv.Error:
            continue
        if len(widths) == 1 and widths.pop() > 1:
            return separator
    first = next((line for line in lines if line.strip()), "")
    return max(_SEPARATORS, key=lambda separator: (first.count(separator), separator == ","))


def _csv_record(columns: list[str], values: list[str], where: str) -> dict[str, Any] | DataError:
    if len(values) != len(columns):
        return DataError(f"{where}: {len(values)} columns, expected {len(columns)}; check quotes and separators")
    return _require_text(dict(zip(columns, values, strict=True)), where)


def _read_parquet(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with tempfile.TemporaryFile() as whole:
            file: IO[bytes] = stream
            if not stream.seekable():  # the table of contents stands at a Parquet file's end
                while piece := stream.read(_CHUNK):
                    whole.write(piece)
                file = whole
            table = pq.ParquetFile(file)
            as_json = [f.name for f in table.schema_arrow if (f.metadata or {}).get(b"steersman.encoding") == b"json"]
            for batch in table.iter_batches(batch_size=256):
                for data in batch.to_pylist():
                    number += 1
                    yield Record(number, _from_parquet(data, as_json))
    except (pa.ArrowException, *UNREADABLE) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        message = f"{name}:{number + 1}: damaged Parquet ({reason}); fetch it again"
        yield Record(number + 1, IncompleteFileError(message))


def _from_parquet(data: dict[str, Any], as_json: list[str]) -> dict[str, Any]:
    """A row as JSON lines would hold it: empty cells are absent, JSON text is what it stands for."""
    row = {name: _exact(value) for name, value in data.items() if value is not None}
    for name in as_json:
        if name in row:
            row[name] = orjson.loads(row[name])
    return {name: _turns(value) if isinstance(value, list) else value for name, value in row.items()}


def _exact(value: Any) -> Any:
    """Decimals as numbers where a double holds them, else as text."""
    if isinstance(value, Decimal):
        return exact_decimal(str(value)) if value.is_finite() else str(value)
    if isinstance(value, dict):
        return {name: _exact(part) for name, part in value.items()}
    return [_exact(part) for part in value] if isinstance(value, list) else value


def _turns(values: list[Any]) -> list[Any]:
    """Messages without their empty fields; other lists as they are."""
    if not all(isinstance(turn, dict) and "role" in turn for turn in values):
        return values
    turns = [{name: value for name, value in turn.items() if value is not None} for turn in values]
    for turn in turns:
        if isinstance(turn.get("tool_calls"), str):
            turn["tool_calls"] = orjson.loads(turn["tool_calls"])
    return turns


def read_hugging_face(name: str, *, split: str | None = None, config: str | None = None) -> Iterator[Record]:
    """Streams a Hugging Face `datasets` id, or a folder that `datasets` can load, split by split."""
    import datasets

    try:
        loaded = datasets.load_dataset(str(Path(name)) if Path(name).exists() else name, config, streaming=True)
    except Exception as error:
        raise DataError(f"{name}: the datasets library cannot load it ({str(error).splitlines()[0]})") from error
    if split is not None and split not in loaded:
        raise DataError(f"{name}: has no split {split!r}; it has {', '.join(loaded)}{meant(split, loaded)}")
    number = 0
    for part in [split] if split else list(loaded):
        try:
            for data in loaded[part]:
                number += 1
                yield Record(number, _exact(data))
        except Exception as error:
            reason = str(error).splitlines()[0]
            yield Record(number + 1, IncompleteFileError(f"{name}:{number + 1}: cannot be read ({reason})"))
