"""Reading foreign data files as a stream of records with their line numbers.

A record that cannot be read comes as a `DataError` in place of the record, and reading goes on behind it wherever
the format allows that; only a damaged gzip or Parquet stream ends a file.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from steersman.data.records import (
    DAMAGED,
    MAX_LINE_BYTES,
    Position,
    describe_json_error,
    display_name,
    open_bytes,
    read_lines,
)
from steersman.errors import DataError

_CHUNK = 1 << 20
_UNREADABLE: tuple[type[Exception], ...] = (OSError, *DAMAGED)
_NO_TEXT: tuple[type[Exception], ...] = (DataError, *_UNREADABLE)
_NO_CSV: tuple[type[Exception], ...] = (csv.Error, *_NO_TEXT)
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Record(NamedTuple):
    """One record of a file."""

    line: int
    """First line of the record (CSV, JSON), or the row's number from 1 (Parquet, Hugging Face)."""
    data: dict[str, Any] | DataError


def read_records(
    path: str | os.PathLike[str], *, header: bool = True, position: Position | None = None
) -> Iterator[Record]:
    """Streams the records of a .jsonl, .json (array), .csv, .tsv or .parquet file, each also as .gz but the last.

    Args:
        path: Local path or fsspec URL.
        header: CSV only; False names the columns "0", "1", ...
        position: Follows the reading, for a progress bar.
    """
    name = display_name(path).lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return _read_parquet(path, position)
    if name.endswith((".csv", ".tsv")):
        return _read_csv(path, "\t" if name.endswith(".tsv") else ",", header, position)
    if name.endswith(".json"):
        return _read_json(path, position)
    return _read_jsonl(path, position)


def _read_jsonl(path: str | os.PathLike[str], position: Position | None) -> Iterator[Record]:
    name = display_name(path)
    for number, line in read_lines(path, position):
        yield Record(number, line if isinstance(line, DataError) else _parse_object(line, f"{name}:{number}"))


def _parse_object(line: bytes, where: str) -> dict[str, Any] | DataError:
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return DataError(f"{where}: {describe_json_error(error, line)}")
    return _require_object(data, where)


def _require_text(data: dict[str, Any] | DataError, where: str) -> dict[str, Any] | DataError:
    """Refuses a record with bytes that were not UTF-8, and with numbers that JSON cannot carry."""
    try:
        orjson.dumps(None if isinstance(data, DataError) else data)
    except TypeError as error:
        reason = "not UTF-8; save the file as UTF-8" if "surrogates" in str(error) else f"{error}; mend the row"
        return DataError(f"{where}: {reason}")
    return data


def _require_object(data: Any, where: str) -> dict[str, Any] | DataError:
    if isinstance(data, dict):
        return data
    return DataError(f"{where}: a JSON {type(data).__name__}, expected an object; mend or remove the row")


def _read_json(path: str | os.PathLike[str], position: Position | None) -> Iterator[Record]:
    """The objects of one top-level JSON array, held in memory one at a time.

    A file whose first character is no bracket is read as JSON lines, which many data sets call .json.
    """
    name = display_name(path)
    with open_bytes(path, position) as stream:
        buffer = ""
        try:
            text = _decoded(stream, name)
            while not buffer.strip() and (chunk := text.read(_CHUNK)):
                buffer += chunk
        except _NO_TEXT as error:
            yield Record(1, _damaged(name, 1, error))
            return
        if buffer.lstrip()[:1] == "[":
            yield from _json_array(text, buffer, name)
            return
    yield from _read_jsonl(path, position)


def _json_array(text: IO[str], buffer: str, name: str) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    at = counted = buffer.index("[") + 1
    line = 1 + buffer.count("\n", 0, at)
    more = True
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        line, counted = line + buffer.count("\n", counted, at), at
        if buffer.startswith("]", at):
            return
        try:
            data, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            # Cut by the end of the chunk, or broken? Only what fails near the end can be mended by reading on.
            reason, failed = (error.msg, error.pos) if isinstance(error, json.JSONDecodeError) else (str(error), at)
            cut = reason.startswith("Unterminated string") or failed >= len(buffer) - 16
            if more and cut and len(buffer) - at < MAX_LINE_BYTES:
                try:
                    chunk = text.read(max(_CHUNK, len(buffer) - at))
                except _UNREADABLE as damage:
                    yield Record(line, _damaged(name, line, damage))
                    return
                more = bool(chunk)
                buffer, at, counted = buffer[at:] + chunk, 0, 0
                continue
            bad = line + buffer.count("\n", at, failed)
            reason = f"not valid JSON ({reason}); mend or remove the row"
            if not buffer[at:].strip():
                reason = "the array has no closing bracket; the file was cut off, fetch it again"
            yield Record(line, DataError(f"{name}:{bad}: {reason}"))
            at = _next_object(buffer, failed)
            if at < 0:
                return
            continue
        yield Record(line, _require_text(_require_object(data, f"{name}:{line}"), f"{name}:{line}"))
        at = end


def _next_object(buffer: str, at: int) -> int:
    """Where the next object of the array seems to begin behind a broken one, or -1."""
    while (comma := buffer.find(",", at)) >= 0:
        at = comma + 1
        behind = buffer[at : at + 64].lstrip()
        before = buffer[max(0, comma - 64) : comma].rstrip()
        if behind[:1] == "{" and before[-1:] in ("}", "]", '"') and "\n" in buffer[at : at + 64]:
            return at
    return -1


def _decoded(stream: IO[bytes], name: str) -> IO[str]:
    """UTF-8 text with bytes that are not UTF-8 kept as surrogates, so that a reader can name their row."""
    start = stream.read(2)
    stream.seek(0)
    if start in _UTF16:
        raise DataError(f"{name}:1: encoded as UTF-16; save the file as UTF-8")
    return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")


def _read_csv(
    path: str | os.PathLike[str], delimiter: str, header: bool, position: Position | None
) -> Iterator[Record]:
    name = display_name(path)
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_bytes(path, position) as stream:
        try:
            reader = csv.reader(_decoded(stream, name), delimiter=delimiter)
            columns = next(reader, None) if header else None
        except _NO_CSV as error:
            yield Record(1, _damaged(name, 1, error))
            return
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield Record(line, DataError(f"{name}:{line}: not valid CSV ({error}); mend or remove the row"))
                continue
            except _UNREADABLE as error:
                yield Record(line, _damaged(name, line, error))
                return
            if values is None:
                return
            if values:
                columns = columns or [str(index) for index in range(len(values))]
                yield Record(line, _csv_record(columns, values, f"{name}:{line}"))


def _csv_record(columns: list[str], values: list[str], where: str) -> dict[str, Any] | DataError:
    if len(values) != len(columns):
        return DataError(f"{where}: {len(values)} columns, expected {len(columns)}; check quotes and separators")
    return _require_text(dict(zip(columns, values, strict=True)), where)


def _damaged(name: str, line: int, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    return DataError(f"{name}:{line}: damaged file ({error}); fetch it again")


def _read_parquet(path: str | os.PathLike[str], position: Position | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = display_name(path)
    number = 0
    with open_bytes(path, position) as stream:
        try:
            file = pq.ParquetFile(stream)
            as_json = [f.name for f in file.schema_arrow if (f.metadata or {}).get(b"steersman.encoding") == b"json"]
            for batch in file.iter_batches(batch_size=256):
                for data in batch.to_pylist():
                    number += 1
                    yield Record(number, _from_parquet(data, as_json))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            yield Record(number + 1, DataError(f"{name}:{number + 1}: damaged Parquet ({reason}); fetch it again"))


def _from_parquet(data: dict[str, Any], as_json: list[str]) -> dict[str, Any]:
    """A row as JSON lines would hold it: empty cells are absent, JSON text is what it stands for."""
    row = {name: value for name, value in data.items() if value is not None}
    for name in as_json:
        if name in row:
            row[name] = orjson.loads(row[name])
    return {name: _turns(value) if isinstance(value, list) else value for name, value in row.items()}


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
        raise DataError(f"{name}: has no split {split!r}; it has {', '.join(loaded)}")
    number = 0
    for part in [split] if split else list(loaded):
        try:
            for data in loaded[part]:
                number += 1
                yield Record(number, data)
        except Exception as error:
            reason = str(error).splitlines()[0]
            yield Record(number + 1, DataError(f"{name}:{number + 1}: cannot be read ({reason})"))
