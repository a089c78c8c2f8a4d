"""The import pipeline: records -> converter -> checks -> duplicates out -> split -> files, in one pass.

Memory does not grow with the files but for 8 bytes a distinct row (the fingerprints against duplicates) and the line
numbers of skipped rows, which go to `skipped.jsonl` as they come. The output appears whole or not at all.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson
from pydantic import ValidationError

from steersman.artifacts import atomic_dir
from steersman.data.formats import Format, ImportOptions, Skip
from steersman.data.records import Position, describe_validation_error, file_digest, row_type_of
from steersman.data.sources import Record, read_hugging_face, read_records
from steersman.data.splits import SeenSet, Splits, encode, encode_parts
from steersman.errors import DataError, StorageError

#: Longest row that is taken over, as JSON; longer ones are named and left out.
MAX_ROW_BYTES = 500_000
_EXAMPLES = 5
_MAX_REASONS = 50


@dataclass(slots=True)
class Skipped:
    """How often rows were left out for one reason, and where first."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """Up to five `file:line`."""


@dataclass(slots=True)
class Summary:
    """What an import read and what became of it."""

    format: str
    read: int = 0
    """Records read, broken ones included."""
    written: int = 0
    duplicates: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """Reason -> how often and where."""
    splits: Counter[str] = field(default_factory=Counter)
    """Rows of each split."""
    files: dict[str, str] = field(default_factory=dict)
    """Written file -> SHA-256."""

    @property
    def skips(self) -> int:
        return sum(entry.count for entry in self.skipped.values())

    def skip(self, reason: str, where: str) -> None:
        if reason not in self.skipped and len(self.skipped) >= _MAX_REASONS:
            reason = "other reasons"
        entry = self.skipped.setdefault(reason, Skipped())
        entry.count += 1
        if len(entry.first) < _EXAMPLES:
            entry.first.append(where)

    def to_dict(self) -> dict[str, Any]:
        skipped = {reason: {"count": entry.count, "first": entry.first} for reason, entry in self.skipped.items()}
        return {
            "format": self.format,
            "read": self.read,
            "written": self.written,
            "duplicates": self.duplicates,
            "skipped": skipped,
            "splits": dict(self.splits),
            "files": self.files,
        }


@dataclass(frozen=True)
class ImportJob:
    """One import: which files, as what, with which metadata."""

    format: Format
    files: tuple[str, ...]
    """Paths, fsspec URLs, or Hugging Face names when `hugging_face` is set."""
    options: ImportOptions = field(default_factory=ImportOptions)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Put on every row that has no such key: source, licence, customer, consent ..."""
    header: bool = True
    hugging_face: bool = False
    hugging_face_split: str | None = None


def convert_rows(
    job: ImportJob, summary: Summary, on_skip: Callable[[str, str], None], progress: Callable[[str, int], None]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Streams the checked, distinct rows of all files of a job, each with its JSON line.

    Args:
        job: What to import.
        summary: Counted into.
        on_skip: Called with (`file:line`, reason) for each part that is left out.
        progress: Called now and then with (file, bytes consumed).
    """
    seen = SeenSet()
    known = {"source": job.format.name, "licence": job.format.licence, **job.metadata}
    known = {name: value for name, value in known.items() if value is not None}
    row_type = job.format.row_type
    may_be_plain = job.format.plain and _is_plain_metadata(known)

    def skip(where: str, reason: str) -> None:
        summary.skip(reason, where)
        on_skip(where, reason)

    for name, record in _all_records(job, progress):
        summary.read += 1
        where = f"{name}:{record.line}"
        if isinstance(record.data, DataError):
            skip(where, record.data.message.partition(": ")[2])
            continue
        for part, row in enumerate(_converted(job, record.data)):
            if isinstance(row, Skip):
                skip(where, row.reason)
                continue
            metadata = {"id": f"{where}.{part}" if part else where, **known}
            plain = may_be_plain and _is_plain_pair(row)
            try:
                if plain:
                    line, fingerprint = encode_parts(row, metadata)
                row = metadata | row
                if not plain:
                    (row_type or row_type_of(row)).model_validate(row)
                    line, fingerprint = encode(row)
            except ValidationError as error:
                skip(where, describe_validation_error(error))
            except DataError as error:
                skip(where, error.message)
            except TypeError as error:  # bytes or decimals in a Parquet column, for example
                skip(where, f"cannot be written as JSON ({error})")
            else:
                if len(line) > MAX_ROW_BYTES:
                    skip(where, f"longer than {MAX_ROW_BYTES:,} bytes")
                elif seen.add(fingerprint):
                    yield row, line
                else:
                    summary.duplicates += 1


_PLAIN_METADATA = frozenset({"source", "licence", "customer"})
_ANSWERS = (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
_PLAIN_KEYS = [name for name, _ in _ANSWERS]


def _is_plain_metadata(metadata: Mapping[str, Any]) -> bool:
    return metadata.keys() <= _PLAIN_METADATA and all(type(value) is str for value in metadata.values())


def _is_plain_pair(row: dict[str, Any]) -> bool:
    """Whether `Preference` accepts a row of a plain format for sure; False means: ask it.

    The short way for nearly every pair of a large data set: the model takes as long as all the rest of an import.
    """
    if list(row) != _PLAIN_KEYS or row["chosen"] == row["rejected"]:
        return False
    for name, last_role in _ANSWERS:
        turns = row[name]
        if not turns or turns[-1]["role"] != last_role:
            return False
        text = turns[-1]["content"]
        if not text or text.isspace():
            return False
    return row["chosen"][0]["role"] == "assistant" and row["rejected"][0]["role"] == "assistant"


def import_to_folder(
    job: ImportJob,
    folder: str | os.PathLike[str],
    splits: Splits,
    progress: Callable[[str, int], None] = lambda file, position: None,
) -> Summary:
    """Imports into `folder`: one JSONL file a split, `skipped.jsonl` with every row left out, `import.json`.

    Raises StorageError when the folder holds something already, DataError when no row could be imported.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise StorageError(f"{target}: is not empty; name a new folder")
    summary = Summary(job.format.name)
    with atomic_dir(target) as partial:
        with ExitStack() as stack:
            sinks: dict[str, IO[bytes]] = {}
            skipped = stack.enter_context(open(partial / "skipped.jsonl", "wb"))

            def on_skip(where: str, reason: str) -> None:
                skipped.write(orjson.dumps({"where": where, "reason": reason}) + b"\n")

            for row, line in convert_rows(job, summary, on_skip, progress):
                split = splits.of(row)
                if split not in sinks:
                    sinks[split] = stack.enter_context(open(partial / f"{split}.jsonl", "wb", 1 << 20))
                sinks[split].write(line + b"\n")
                summary.written += 1
                summary.splits[split] += 1
        if not summary.written:
            raise DataError(f"nothing to import: {describe_skips(summary)}", details=summary.to_dict())
        summary.files = {path.name: file_digest(path) for path in sorted(partial.glob("*.jsonl"))}
        (partial / "import.json").write_bytes(orjson.dumps(summary.to_dict(), option=orjson.OPT_INDENT_2) + b"\n")
    return summary


def describe_skips(summary: Summary) -> str:
    """One sentence about what was left out and where first."""
    if not summary.skipped:
        return f"{summary.read} records read, none left out"
    parts = [
        f"{entry.count} x {reason} ({', '.join(entry.first)}{', ...' if entry.count > len(entry.first) else ''})"
        for reason, entry in summary.skipped.items()
    ]
    return f"{summary.read} records read; left out: " + "; ".join(parts)


def _all_records(job: ImportJob, progress: Callable[[str, int], None]) -> Iterator[tuple[str, Record]]:
    if job.hugging_face:
        for name in job.files:
            for record in read_hugging_face(name, split=job.hugging_face_split):
                yield name, record
        return
    for file, name in zip(job.files, _short_names(job.files), strict=True):
        position = Position()
        for count, record in enumerate(read_records(file, header=job.header, position=position)):
            yield name, record
            if count % 2000 == 0:
                progress(file, position.tell())
        progress(file, -1)


def _converted(job: ImportJob, data: dict[str, Any]) -> Iterable[dict[str, Any] | Skip]:
    """The parts of one record; a record of the wrong shape becomes a Skip."""
    try:
        return list(job.format.convert(data, job.options))
    except KeyError as error:
        return [Skip(f"missing column {error}; check the format and the file")]
    except DataError as error:
        return [Skip(error.message)]
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        return [Skip(f"record has another shape than {job.format.name} ({error})")]


def _short_names(files: tuple[str, ...]) -> list[str]:
    """File names for messages and row ids, with as many parent folders as it takes to tell them apart."""
    depth: dict[str, int] = defaultdict(lambda: 1)
    while True:
        names = ["/".join(os.fspath(file).split("/")[-depth[file] :]) for file in files]
        twice = {name for name, count in Counter(names).items() if count > 1}
        clashing = {file for file, name in zip(files, names, strict=True) if name in twice}
        if len(clashing) < 2 or all(depth[file] > file.count("/") for file in clashing):
            return names
        for file in clashing:
            depth[file] += 1
