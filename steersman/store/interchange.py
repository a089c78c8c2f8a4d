"""Single judgements in and out: who said what about which item, when. JSON lines and CSV, each readable again.

    {"item": "q7", "labeler": "ann", "value": "a", "strength": 2, "time": "2026-03-04T10:00:00+00:00", "seconds": 12.5}

`value` is, by kind of project: a, b or tie (the item's first and second answer); a ranking of positions from 0 as
`2>0=1`; nothing where `aspects.NAME` (1 to 5) or `edit` say it; `skip` in all of them. `verdict` may stand in its
place.
"""

from __future__ import annotations

import csv
import datetime as dt
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from steersman.artifacts import storage_errors
from steersman.data.records import describe_validation_error
from steersman.data.truth import read_consent
from steersman.errors import ConflictError, DataError, InvalidArgumentError
from steersman.store.judging import NewJudgement, ensure_labeler, record_many
from steersman.store.models import Item, Judgement, Labeler, Project, now
from steersman.store.storable import holds_unstorable
from steersman.store.verdicts import Verdict

PARTS = ("item", "labeler", "value", "strength", "edit", "note", "unsafe", "time", "seconds", "event_id", "verdict")
_CHUNK = 500
#: Seconds since 1970 that a number is one of: 1973 to 5138; in milliseconds it is larger.
_EARLIEST, _LATEST = 1e8, 1e11


@dataclass
class Taken:
    """What became of the judgements of a file."""

    new: int = 0
    there_already: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> how many."""


def import_judgements(
    session: Session,
    project: Project,
    records: Iterable[dict[str, Any]],
    columns: Mapping[str, str] | None = None,
    values: Mapping[str, str] | None = None,
) -> Taken:
    """Records judgements that were given elsewhere, oldest first, each with the time at which it was given.

    Equal votes of different people are all kept; a row without a labeler is the vote of one more unknown person. The
    same file again changes nothing. A later judgement of one person on one item takes the place of the earlier.

    Args:
        session: A writing session.
        project: Where the items are.
        records: Rows as above.
        columns: Part -> column, where the file has other names.
        values: What the file calls a, b and tie: {"a": "left", ...}.
    """
    taken = Taken()
    meaning = {said.casefold(): value for value, said in (values or {}).items()}
    known = sa.select(Item.key, Item.id).where(Item.project_id == project.id)
    items: dict[str, int] = {key: item_id for key, item_id in session.execute(known)}  # noqa: C416 - rows, not pairs
    unknown: Counter[str] = Counter()
    labelers: dict[str, int] = {}
    ready: list[NewJudgement] = []
    for record in records:
        try:
            row = _renamed(record, columns or {})
            key = str(row.get("item", ""))
            if key not in items:
                raise DataError(f"item {key!r} is not in project {project.name!r}" if key else "no item is named")
            verdict = _verdict(project, row, meaning)
            name = str(row.get("labeler") or "")
            if not name:
                unknown[key] += 1
                name = f"unknown {unknown[key]}"
            if holds_unstorable([name, verdict.to_dict()]) or len(name) > 200:
                raise DataError("a text that no database keeps, or a name longer than 200 characters")
            if name not in labelers:
                labelers[name] = ensure_labeler(session, name).id
            at = _time(row.get("time"))
            seconds = _seconds(row.get("seconds"))
            event = row.get("event_id") or _event_id(project, key, name, row.get("time"), verdict)
            ready.append(NewJudgement(items[key], labelers[name], verdict, seconds, str(event)[:64], created_at=at))
        except ValidationError as error:
            taken.left_out[describe_validation_error(error)] += 1
        except (DataError, InvalidArgumentError) as error:
            taken.left_out[error.message] += 1
        except (TypeError, ValueError) as error:
            taken.left_out[str(error)] += 1
    ready.sort(key=lambda judgement: judgement.created_at)
    for start in range(0, len(ready), _CHUNK):
        chunk = _with_own_events(session, project, ready[start : start + _CHUNK])
        try:
            new = record_many(session, project, chunk)
        except ConflictError as error:
            raise DataError(error.message) from error
        taken.new += new
        taken.there_already += len(chunk) - new
    return taken


def export_judgements(session: Session, project: Project, *, undone: bool = False) -> Iterator[dict[str, Any]]:
    """Every judgement as a row that `import_judgements` reads, oldest first; undone ones on request, marked."""
    query = (
        sa.select(Judgement, Item.key, Labeler.name)
        .join(Item, Item.id == Judgement.item_id)
        .join(Labeler, Labeler.id == Judgement.labeler_id)
        .where(Judgement.project_id == project.id)
        .order_by(Judgement.id)
        .execution_options(yield_per=1000)
    )
    if not undone:
        query = query.where(Judgement.undone_at.is_(None))
    for judgement, key, name in session.execute(query):
        row = {
            "item": key,
            "labeler": name,
            **_said(project, judgement.verdict),
            "time": judgement.created_at.isoformat(),
            "seconds": judgement.seconds,
            "event_id": judgement.event_id,
            "settings": judgement.project_version,
        }
        if judgement.undone_at is not None:
            row["undone"] = judgement.undone_at.isoformat()
        yield row


def write_judgements(rows: Iterable[dict[str, Any]], target: Path, aspects: Iterable[str]) -> int:
    """Writes rows as CSV where the file ends in .csv, else as JSON lines; returns their number."""
    count = 0
    with storage_errors(target), open(target, "w", newline="") as sink:
        if target.suffix.lower() == ".csv":
            writer = csv.DictWriter(sink, csv_columns(aspects), extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                writer.writerow(csv_row(row))
                count += 1
        else:
            for row in rows:
                sink.write(orjson.dumps(row).decode() + "\n")
                count += 1
    return count


def csv_columns(aspects: Iterable[str]) -> list[str]:
    parts = [part for part in PARTS if part != "verdict"]
    return [*parts, *(f"aspects.{aspect}" for aspect in aspects), "settings", "undone"]


def csv_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _harmless(value) for name, value in row.items()}


def _harmless(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula; the apostrophe is what they themselves write."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _renamed(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    row = dict(record)
    for part, column in columns.items():
        if column not in record:
            raise DataError(f"missing column {column!r}; check --column")
        row[part] = record[column]
    return {name: None if value == "" else _as_said(value) for name, value in row.items()}


def _as_said(value: Any) -> Any:
    """A text without the apostrophe that `_harmless` puts before it."""
    return value[1:] if isinstance(value, str) and value[:1] == "'" and _harmless(value[1:]) == value else value


def _said(project: Project, verdict: dict[str, Any]) -> dict[str, Any]:
    said = {name: verdict[name] for name in ("strength", "edit", "note", "unsafe") if verdict.get(name)}
    if verdict.get("skip"):
        return {"value": "skip"} | said
    if ranking := verdict.get("ranking"):
        if project.kind == "compare":
            said["value"] = "tie" if len(ranking) == 1 else "ab"[ranking[0][0]]
        else:
            said["value"] = ">".join("=".join(map(str, group)) for group in ranking)
    return said | {f"aspects.{name}": value for name, value in (verdict.get("ratings") or {}).items()}


def _verdict(project: Project, row: dict[str, Any], meaning: Mapping[str, str]) -> Verdict:
    if isinstance(row.get("verdict"), dict):
        return Verdict.model_validate(row["verdict"])
    value = str(row.get("value") if row.get("value") is not None else "").strip().casefold()
    value = meaning.get(value, value)
    given: dict[str, Any] = {"note": str(row.get("note") or ""), "unsafe": bool(read_consent(row.get("unsafe")))}
    if value == "skip":
        return Verdict(skip=True, **given)
    if project.kind == "compare":
        ranking = {"a": ((0,), (1,)), "b": ((1,), (0,)), "tie": ((0, 1),)}.get(value)
        if ranking is None:
            raise DataError(f"value is {value!r}; expected a, b, tie or skip, or name them with --value")
        given["ranking"] = ranking
        if row.get("strength") is not None and value != "tie":
            given["strength"] = int(row["strength"])
    elif project.kind == "rank":
        given["ranking"] = tuple(tuple(int(at) for at in group.split("=")) for group in value.split(">"))
    elif project.kind == "rate":
        given["ratings"] = {
            name.removeprefix("aspects."): int(rating)
            for name, rating in row.items()
            if name.startswith("aspects.") and rating is not None
        }
    else:
        given["edit"] = row.get("edit") or row.get("value")
    return Verdict.model_validate(given)


def _time(value: Any) -> dt.datetime:
    if value is None:
        return now()
    try:
        if isinstance(value, int | float) or str(value).replace(".", "", 1).isdigit():
            since = float(value)
            if since < _EARLIEST:  # a year, or a serial number of a spreadsheet
                raise ValueError
            return dt.datetime.fromtimestamp(since / 1000 if since > _LATEST else since, dt.UTC)
        found = dt.datetime.fromisoformat(str(value))
    except (ValueError, OverflowError):
        raise DataError(f"time is {value!r}; expected ISO 8601, or seconds or milliseconds since 1970") from None
    return found if found.tzinfo else found.replace(tzinfo=dt.UTC)


def _seconds(value: Any) -> float:
    seconds = float(value or 0.0)
    if math.isnan(seconds):
        raise DataError("seconds is no number; leave the cell empty")
    return min(max(seconds, 0.0), 86_400.0)


def _with_own_events(session: Session, project: Project, judgements: list[NewJudgement]) -> list[NewJudgement]:
    """Judgements whose event ids another project has, as those of an export that is read into a second project, get ids
    of this one's own: the same again at a repetition."""
    query = sa.select(Judgement.event_id).where(
        Judgement.event_id.in_([judgement.event_id for judgement in judgements]), Judgement.project_id != project.id
    )
    taken = set(session.scalars(query))
    return [
        replace(judgement, event_id=_hashed([project.id, judgement.event_id]))
        if judgement.event_id in taken
        else judgement
        for judgement in judgements
    ]


def _event_id(project: Project, item: str, labeler: str, time: Any, verdict: Verdict) -> str:
    return _hashed([project.id, item, labeler, str(time), verdict.to_dict()])


def _hashed(said: list[Any]) -> str:
    content = orjson.dumps(said, option=orjson.OPT_SORT_KEYS)
    return "import-" + hashlib.blake2b(content, digest_size=16).hexdigest()
