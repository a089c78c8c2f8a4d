"""The import pipeline: records -> converter -> checks -> duplicates out -> split -> files, in one pass.

Memory does not grow with the files but for 8 bytes a distinct row (the fingerprints against duplicates); skipped rows
go to `skipped.jsonl` as they come. The output appears whole or not at all. A row without an id of its own gets one
from its content, so that it is the same row wherever it is read; `origin` says where that was.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson
from pydantic import ValidationError

from steersman.artifacts import atomic_dir, file_digest, whole_file
from steersman.data.format import Format, ImportOptions, Skip
from steersman.data.near import NearDuplicates
from steersman.data.opening import Position, display_name, expand
from steersman.data.plain import MAX_TENANT, is_plain, seldom_collected
from steersman.data.records import IncompleteFileError, Row, describe_validation_error, row_type_of
from steersman.data.sources import Record, read_hugging_face, read_records
from steersman.data.splits import CONTENT, SeenSet, Splits, content_id, fingerprint, join_parts
from steersman.data.truth import consent_of, names_consent, read_label, says_consent
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
    """Equal rows left out; of judgements all are kept, because equal ones are several people's."""
    near_duplicates: int = 0
    """Rows left out because they are nearly equal to one before."""
    ids_made_unique: int = 0
    """Ids of the file's own that stood twice."""
    not_kept: Counter[str] = field(default_factory=Counter)
    """Field of the records, or part of one, that the rows do not hold -> records that had something in it."""
    ungrouped: int = 0
    """Rows without the key that the splits go by: they lie together on one side."""
    incomplete: list[str] = field(default_factory=list)
    """Files that ended before their end, and where."""
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
            "near_duplicates": self.near_duplicates,
            "ids_made_unique": self.ids_made_unique,
            "not_kept": dict(sorted(self.not_kept.items())),
            "ungrouped": self.ungrouped,
            "incomplete": self.incomplete,
            "skipped": skipped,
            "splits": dict(self.splits),
            "files": self.files,
        }


@dataclass(frozen=True)
class ImportJob:
    """One import: which files, as what, with which metadata."""

    format: Format
    files: tuple[str, ...]
    """Paths, folders, patterns, fsspec URLs, `-`, or Hugging Face names when `hugging_face` is set."""
    options: ImportOptions = field(default_factory=ImportOptions)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Put on every row that has no such key: source, licence, customer, consent ..."""
    header: bool = True
    hugging_face: bool = False
    hugging_face_split: str | None = None
    separator: str | None = None
    """CSV: what is between columns; None tells it from the first lines."""
    encoding: str | None = None
    """Of text files that are neither UTF-8 nor marked as UTF-16 or UTF-32."""
    namespace: str = ""
    """Put before every id, as `shop/`: keeps the ids of several sources apart."""
    near_duplicates: float | None = None
    """Least similarity (Jaccard, by MinHash) at which `import_to_folder` leaves a row out as a near copy; None looks
    for equal rows."""


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
    known = {"source": job.format.name, "licence": job.format.licence, **job.metadata}
    known = {name: value for name, value in known.items() if value is not None}
    may_be_plain = job.format.plain and _is_plain_metadata(known)
    identities = _Identities(job, summary)
    unread = _Unread(summary.not_kept)

    def skip(where: str, reason: str) -> None:
        summary.skip(reason, where)
        on_skip(where, reason)

    for name, record in _all_records(job, progress):
        summary.read += 1
        where = f"{name}:{record.line}"
        if isinstance(record.data, DataError):
            if isinstance(record.data, IncompleteFileError):
                summary.incomplete.append(where)
            skip(where, record.data.message.partition(": ")[2])
            continue
        for row in _converted(job, record.data, unread):
            if isinstance(row, Skip):
                skip(where, row.reason)
                continue
            try:
                if may_be_plain and list(row) == _PAIR and is_plain(row, "preference"):
                    content, metadata = row, known
                else:
                    content, metadata = _checked(job.format, known | row)
                first = orjson.dumps(content)
                found = identities.of(first, metadata)
                if found is None:
                    continue
                metadata = {"id": found, "origin": where} | metadata | {"id": found}
                line = join_parts(first, metadata)
            except ValidationError as error:
                skip(where, describe_validation_error(error))
            except DataError as error:
                skip(where, error.message)
            except ValueError as error:
                skip(where, str(error))
            except TypeError as error:  # bytes in a Parquet column, for example
                skip(where, f"cannot be written as JSON ({error})")
            else:
                if len(line) > MAX_ROW_BYTES:
                    skip(where, f"longer than {MAX_ROW_BYTES:,} bytes")
                else:
                    yield metadata | content, line


def _checked(format: Format, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content and metadata of a row, as its type reads them: consent and labels as truth values, names as text.

    Raises ValueError for a row that its type refuses.
    """
    if "label" in row:
        row["label"] = read_label(row["label"])
    checked: Row = (format.row_type or row_type_of(row)).model_validate(row)
    read = checked.to_dict()
    content = {name: read.pop(name) for name in CONTENT if name in read}
    return content, read


class _Identities:
    """Which rows were there before, and their ids."""

    def __init__(self, job: ImportJob, summary: Summary) -> None:
        self._votes = job.format.votes
        self._namespace = f"{job.namespace.rstrip('/')}/" if job.namespace else ""
        self._summary = summary
        self._seen = SeenSet()
        self._ids = SeenSet()
        self._again: Counter[str] = Counter()

    def of(self, content: bytes, metadata: dict[str, Any]) -> str | None:
        """The row's id; None for a copy of an earlier row.

        Who refused training is kept beside an equal row of somebody who did not.
        """
        refused = metadata.get("consent") is False
        bits = fingerprint(content + b"refused" if refused else content)
        fresh = self._seen.add(bits)
        if not fresh and not self._votes:
            self._summary.duplicates += 1
            return None
        own = metadata.get("id")
        name = f"{self._namespace}{own or content_id(bits)}"
        if (own is not None and not self._ids.add(fingerprint(name.encode()))) or (own is None and not fresh):
            self._again[name] += 1
            self._summary.ids_made_unique += own is not None
            name = f"{name}.{self._again[name]}"
        return name


def _text_of(row: dict[str, Any]) -> str:
    turns = [turn for part in row.values() if isinstance(part, list) for turn in part]
    return "\n".join(turn["content"] for turn in turns if isinstance(turn, dict))


class _Watched(dict[str, Any]):
    """A record that remembers which of its fields were asked for."""

    def __init__(self, record: dict[str, Any], asked: set[str]) -> None:
        super().__init__(record)
        self._asked = asked

    def __getitem__(self, name: str) -> Any:
        self._asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._asked.add(name)
        return super().get(name, default)

    # Whoever goes through all of it, or copies it (`dict` asks for an iterator of one's own first), has seen all.

    def __iter__(self) -> Iterator[str]:
        self._asked.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self._asked.update(super().keys())
        return super().keys()

    def items(self) -> Any:
        self._asked.update(super().keys())
        return super().items()

    def values(self) -> Any:
        self._asked.update(super().keys())
        return super().values()


#: Said of every row whatever its format: kept where a converter does not look at them.
_CARRIED = ("consent", "customer", "licence", "id")
_CARRIED_KEYS = frozenset(_CARRIED)


class _Unread:
    """Which fields of the records a converter never looks at: they are lost, so they are counted and said."""

    def __init__(self, found: Counter[str]) -> None:
        self._asked: set[str] = set(_CARRIED)
        self._found = found

    def watch(self, record: dict[str, Any]) -> dict[str, Any]:
        return record if record.keys() <= self._asked else _Watched(record, self._asked)

    def count(self, record: dict[str, Any], lost: set[str]) -> None:
        """Counts what a record has and its rows have not: fields never asked for, and what their format names."""
        self._found.update(lost)
        for name in record.keys() - self._asked:
            if record[name] not in (None, "", [], {}) and says_consent(name) is None:
                self._found[name] += 1


_PAIR = ["prompt", "chosen", "rejected"]  # in the order in which `encode` writes them
_PLAIN_METADATA = frozenset({"source", "licence", "customer"})


def _is_plain_metadata(metadata: Mapping[str, Any]) -> bool:
    return metadata.keys() <= _PLAIN_METADATA and all(
        type(value) is str and len(value) <= MAX_TENANT for value in metadata.values()
    )


@seldom_collected()
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

            near: NearDuplicates | None = None
            numbers: defaultdict[str, array[int]] = defaultdict(lambda: array("Q"))
            """Of each split, which rows of all lie in it."""
            if job.near_duplicates is not None:
                near = stack.enter_context(NearDuplicates(job.near_duplicates, partial))
            for row, line in convert_rows(job, summary, on_skip, progress):
                split = splits.of(row)
                if split not in sinks:
                    sinks[split] = stack.enter_context(open(partial / f"{split}.jsonl", "wb", 1 << 20))
                sinks[split].write(line + b"\n")
                if near is not None:
                    near.add(_text_of(row))
                    numbers[split].append(summary.written)
                summary.written += 1
                summary.splits[split] += 1
            if near is not None:
                copies = near.copies()
                for split, sink in sinks.items():
                    sink.flush()
                    summary.splits[split] -= _take_out(partial / f"{split}.jsonl", copies[numbers[split]])
                summary.near_duplicates = int(copies.sum())
                summary.written -= summary.near_duplicates
        summary.ungrouped = splits.ungrouped
        if not summary.written:
            raise DataError(f"nothing to import: {describe_skips(summary)}", details=summary.to_dict())
        summary.files = {path.name: file_digest(path) for path in sorted(partial.glob("*.jsonl"))}
        (partial / "import.json").write_bytes(orjson.dumps(summary.to_dict(), option=orjson.OPT_INDENT_2) + b"\n")
    return summary


def _take_out(path: Path, unwanted: Any) -> int:
    """Rewrites a file without the lines that are unwanted, bool [lines]; returns how many went."""
    if unwanted.any():
        with whole_file(path) as kept, open(path, "rb") as lines, open(kept, "wb", 1 << 20) as sink:
            sink.writelines(line for line, out in zip(lines, unwanted.tolist(), strict=True) if not out)
    return int(unwanted.sum())


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
    files = expand(job.files)
    for file, name in zip(files, _short_names(files), strict=True):
        position = Position()
        records = read_records(
            file, header=job.header, separator=job.separator, encoding=job.encoding, position=position
        )
        for count, record in enumerate(records):
            yield name, record
            if count % 2000 == 0:
                progress(file, position.tell())
        progress(file, -1)


def _converted(job: ImportJob, data: dict[str, Any], unread: _Unread) -> Iterable[dict[str, Any] | Skip]:
    """The parts of one record; a record of the wrong shape becomes a Skip."""
    try:
        rows = list(job.format.convert(unread.watch(data), job.options))
        lost = set(job.format.lost(data))
    except KeyError as error:
        return [Skip(f"missing column {error}; check the format and the file")]
    except DataError as error:
        return [Skip(error.message)]
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        return [Skip(f"record has another shape than {job.format.name} ({error})")]
    unread.count(data, lost)
    carried = (
        {name: data[name] for name in _CARRIED if data.get(name) is not None} if _CARRIED_KEYS & data.keys() else {}
    )
    if names_consent(data):
        try:
            carried["consent"] = consent_of(data)
        except ValueError as error:
            return [Skip(str(error))]
    if carried:
        if len(rows) > 1:
            carried.pop("id", None)  # one id for several rows says nothing
        rows = [row if isinstance(row, Skip) else carried | row for row in rows]
    return rows


def _short_names(files: tuple[str, ...]) -> list[str]:
    """File names for messages and origins, with as many parent folders as it takes to tell them apart."""
    depth: dict[str, int] = defaultdict(lambda: 1)
    while True:
        names = [_last_parts(file, depth[file]) for file in files]
        twice = {name for name, count in Counter(names).items() if count > 1}
        clashing = {file for file, name in zip(files, names, strict=True) if name in twice}
        if len(clashing) < 2 or all(depth[file] > file.count("/") for file in clashing):
            return names
        for file in clashing:
            depth[file] += 1


def _last_parts(file: str, count: int) -> str:
    return display_name(file) if count == 1 else "/".join(os.fspath(file).split("/")[-count:])
