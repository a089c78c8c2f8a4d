"""Where the rows of a release come from: judged items, live feedback, files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson
import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from steersman.data.format import Skip
from steersman.data.grouping import Groups
from steersman.data.opening import display_name
from steersman.data.pairs import Preferred, keep, mean_ratings, preferences, rated_pairs
from steersman.data.plain import is_plain
from steersman.data.records import ROW_TYPES, Aspects, Return, at, describe_validation_error, row_type_of
from steersman.data.returns import SOURCES, ranked_returns, rating_return, returns_of
from steersman.data.rules import ReleaseOptions
from steersman.data.sources import read_records
from steersman.errors import DataError
from steersman.store.feedback import feedback_rows, preference_rows, return_rows
from steersman.store.judging import get_project
from steersman.store.models import Item, Judgement, Project

Kept = Iterator[dict[str, Any] | Skip]


def source_rows(session: Session, options: ReleaseOptions, source: str) -> Kept:
    """The rows of one source, with a `Skip` in place of each that the rules leave out."""
    if source.startswith("project:"):
        project = get_project(session, source.removeprefix("project:"))
        return _project_rows(session, project, options)
    if source == "feedback":
        if options.kind == "preference":
            return preference_rows(session, browser_edits=options.browser_edits, lookups=options.lookups)
        if options.kind == "feedback":
            return feedback_rows(session, lookups=options.lookups)
        if options.kind == "return":
            return return_rows(session, lookups=options.lookups)
        raise DataError(f"feedback: gives rows of type preference, feedback and return, not {options.kind}")
    return _file_rows(source, options)


def _file_rows(path: str, options: ReleaseOptions) -> Kept:
    """Canonical rows; ratings become pairs where a preference is asked, judgements of any kind returns."""
    if options.kind == "return":
        return _returns_of_file(path, options)
    rows = _typed_rows(path, options.kind)
    return _pairs_of_ratings(rows, options) if options.kind == "preference" else rows


def _returns_of_file(path: str, options: ReleaseOptions) -> Kept:
    name = display_name(path)
    for record in read_records(path):
        if isinstance(record.data, DataError):
            raise record.data
        row_type = row_type_of(record.data)
        try:
            read = (row_type if row_type in SOURCES.values() else Return).model_validate(record.data)
        except ValidationError as error:
            raise DataError(f"{name}:{record.line}: {describe_validation_error(error)}") from None
        with at(f"{name}:{record.line}"):
            returns: list[dict[str, Any] | Skip] = [one.to_dict() for one in returns_of(read, options.rule)]
        yield from returns or [Skip("no rated aspect counts")]


def _typed_rows(path: str, kind: str) -> Kept:
    """The rows of a file as their type gives them back: consent in words is consent, too."""
    name = display_name(path)
    for record in read_records(path):
        if isinstance(record.data, DataError):
            raise record.data
        row = record.data
        if is_plain(row, kind):
            yield row
            continue
        row_type = Aspects if kind == "preference" and "aspects" in row else ROW_TYPES[kind]
        try:
            yield row_type.model_validate(row).to_dict()
        except ValidationError as error:
            raise DataError(f"{name}:{record.line}: {describe_validation_error(error)}") from None


def _project_rows(session: Session, project: Project, options: ReleaseOptions) -> Kept:
    rows = _judged_items(session, project, options)
    if project.kind == "rate":
        rated = _rated_rows(rows)
        if options.kind == "aspects":
            yield from rated
        elif options.kind == "return":
            for row in rated:
                yield row if isinstance(row, Skip) else _rated_return(row, options)
        elif options.kind == "preference":
            yield from _pairs_of_ratings(rated, options)
        else:
            raise DataError(f"project {project.name}: ratings give rows of type aspects, preference and return")
    elif project.kind == "edit" and options.kind in ("preference", "demonstration", "return"):
        yield from _edited_rows(rows, options)
    elif project.kind in ("compare", "rank") and options.kind in ("preference", "return"):
        yield from _ranked_rows(rows, options)
    else:
        raise DataError(f"project {project.name}: a {project.kind} project gives no rows of type {options.kind}")


Judged = tuple[Item, list[dict[str, Any]]]


def _judged_items(session: Session, project: Project, options: ReleaseOptions) -> Iterator[Judged | Skip]:
    """Items that are no honeypots, with their verdicts in the order of the labelers."""
    query = (
        sa.select(Item, Judgement)
        .join(Judgement, Judgement.item_id == Item.id)
        .where(Item.project_id == project.id, Item.honeypot.is_(False), Judgement.undone_at.is_(None))
        .order_by(Item.id, Judgement.labeler_id)
        .execution_options(yield_per=1000)
    )
    item: Item | None = None
    verdicts: list[dict[str, Any]] = []
    for found, judgement in session.execute(query):
        if item is not None and found.id != item.id:
            yield _usable(item, verdicts, options)
            verdicts = []
        item = found
        verdicts.append(judgement.verdict)
    if item is not None:
        yield _usable(item, verdicts, options)


def _usable(item: Item, verdicts: list[dict[str, Any]], options: ReleaseOptions) -> Judged | Skip:
    if item.resolution is not None:  # decided: that verdict alone holds
        return Skip("flagged unsafe") if item.resolution.get("unsafe") else (item, [item.resolution])
    if any(verdict.get("unsafe") for verdict in verdicts):
        return Skip("flagged unsafe")
    if sum(not verdict.get("skip") for verdict in verdicts) < options.min_judgements:
        return Skip("too few judgements")
    return item, verdicts


def _ranked_rows(items: Iterator[Judged | Skip], options: ReleaseOptions) -> Kept:
    for entry in items:
        if isinstance(entry, Skip):
            yield entry
            continue
        item, verdicts = entry
        answers = [candidate["messages"] for candidate in item.candidates]
        pairs = preferences(verdicts)
        if options.kind == "preference":
            yield from _pair_rows(pairs, _origin(item), answers, options)
            continue
        for number, worth in ranked_returns(pairs).items():
            origin = _origin(item)
            yield origin | {"id": f"{origin['id']}#{number}", "completion": answers[number], "reward": worth}


def _rated_rows(items: Iterator[Judged | Skip]) -> Kept:
    for entry in items:
        if isinstance(entry, Skip):
            yield entry
            continue
        item, verdicts = entry
        ratings = mean_ratings(verdicts)
        yield _origin(item) | {
            "completion": item.candidates[0]["messages"],
            "aspects": ratings,
            "scales": {aspect: [1, 5] for aspect in ratings},
        }


def _edited_rows(items: Iterator[Judged | Skip], options: ReleaseOptions) -> Kept:
    for entry in items:
        if isinstance(entry, Skip):
            yield entry
            continue
        item, verdicts = entry
        for number, verdict in enumerate(verdicts):
            if not verdict.get("edit"):
                continue
            better = [{"role": "assistant", "content": verdict["edit"]}]
            origin = _origin(item)
            origin["id"] += f".{number}" if number else ""
            if options.kind == "demonstration":
                prompt = origin.pop("prompt")
                yield origin | {"messages": prompt + better}
            elif options.kind == "return":
                yield origin | {"completion": better, "reward": 1.0}
                yield origin | {"id": f"{origin['id']}#0", "completion": item.candidates[0]["messages"], "reward": -1.0}
            else:
                yield origin | {"chosen": better, "rejected": item.candidates[0]["messages"]}


def _rated_return(row: dict[str, Any], options: ReleaseOptions) -> dict[str, Any] | Skip:
    worth = rating_return(row, options.rule)
    if worth is None:
        return Skip("no rated aspect counts")
    return {name: value for name, value in row.items() if name not in ("aspects", "scales")} | {"reward": worth}


def _pairs_of_ratings(rows: Kept, options: ReleaseOptions) -> Kept:
    """All pairs of rated answers of one person to the same prompt, scored as `steersman.data.aspects` does.

    Rows without ratings pass. A pair may be used only as far as both of its answers may: a refusal of one is left out
    before it meets the other.
    """
    with Groups(lambda row: orjson.dumps([row["prompt"], row.get("customer"), row.get("end_customer")])) as ratings:
        for row in rows:
            if isinstance(row, Skip) or "aspects" not in row:
                yield row
            elif row.get("consent") is False:
                yield Skip("no consent")
            else:
                ratings.add(row)
        for group in ratings:
            own = ("completion", "aspects", "scales", "consent")
            origin = {name: value for name, value in group[0].items() if name not in own}
            if all(row.get("consent") for row in group):
                origin["consent"] = True
            if len(group) == 1:
                yield Skip("only one rated answer to the prompt")
            pairs = rated_pairs(group, options.rule)
            yield from _pair_rows(pairs, origin, [row["completion"] for row in group], options)


def _pair_rows(
    found: Iterable[Preferred | Skip], origin: dict[str, Any], answers: list[Any], options: ReleaseOptions
) -> Kept:
    for pair, soft in keep(found, options.ties, options.disagreement):
        if isinstance(pair, Skip):
            yield pair
            continue
        row = origin | {
            "id": f"{origin.get('id', '')}#{pair.chosen}>{pair.rejected}",
            "chosen": answers[pair.chosen],
            "rejected": answers[pair.rejected],
            "margin": pair.margin,
        }
        yield row if soft is None else row | {"soft_label": soft}


def _origin(item: Item) -> dict[str, Any]:
    row = {
        **item.meta,
        "id": f"item:{item.key}",
        "customer": item.customer,
        "consent": item.consent,
        "prompt": item.prompt,
    }
    return {name: value for name, value in row.items() if value is not None}
