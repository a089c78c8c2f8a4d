"""Where the rows of a release come from: judged items, live feedback, files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import orjson
import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from steersman.data.pairs import Preferred, keep, mean_ratings, preferences, rated_pairs
from steersman.data.records import ROW_TYPES, describe_validation_error, display_name
from steersman.data.rules import ReleaseOptions
from steersman.data.sources import read_records
from steersman.errors import DataError
from steersman.store.feedback import feedback_rows, preference_rows
from steersman.store.judging import get_project
from steersman.store.models import Item, Judgement, Project

Kept = Iterator[dict[str, Any] | str]


def source_rows(session: Session, options: ReleaseOptions, source: str) -> Kept:
    """The rows of one source, with a reason in place of each that the rules leave out."""
    if source.startswith("project:"):
        project = get_project(session, source.removeprefix("project:"))
        return _project_rows(session, project, options)
    if source == "feedback":
        if options.kind == "preference":
            return preference_rows(session)
        if options.kind == "feedback":
            return feedback_rows(session)
        raise DataError(f"feedback: gives rows of type preference and feedback, not {options.kind}")
    return _file_rows(source, options)


def _file_rows(path: str, options: ReleaseOptions) -> Kept:
    """Canonical rows; ratings become pairs where a preference is asked."""
    name = display_name(path)
    ratings: list[dict[str, Any]] = []
    for record in read_records(path):
        if isinstance(record.data, DataError):
            raise record.data
        row = record.data
        if options.kind == "preference" and "aspects" in row:
            ratings.append(row)
            continue
        try:
            ROW_TYPES[options.kind].model_validate(row)
        except ValidationError as error:
            raise DataError(f"{name}:{record.line}: {describe_validation_error(error)}") from None
        yield row
    yield from _pairs_of_ratings(ratings, options)


def _project_rows(session: Session, project: Project, options: ReleaseOptions) -> Kept:
    rows = _judged_items(session, project, options)
    if project.kind == "rate":
        rated = _rated_rows(rows)
        if options.kind == "aspects":
            yield from rated
        elif options.kind == "preference":
            rows_only: list[dict[str, Any]] = []
            for row in rated:
                if isinstance(row, str):
                    yield row
                else:
                    rows_only.append(row)
            yield from _pairs_of_ratings(rows_only, options)
        else:
            raise DataError(f"project {project.name}: ratings give rows of type aspects and preference")
    elif project.kind == "edit" and options.kind in ("preference", "demonstration"):
        yield from _edited_rows(rows, options)
    elif project.kind in ("compare", "rank") and options.kind == "preference":
        yield from _ranked_rows(rows, options)
    else:
        raise DataError(f"project {project.name}: a {project.kind} project gives no rows of type {options.kind}")


Judged = tuple[Item, list[dict[str, Any]]]


def _judged_items(session: Session, project: Project, options: ReleaseOptions) -> Iterator[Judged | str]:
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


def _usable(item: Item, verdicts: list[dict[str, Any]], options: ReleaseOptions) -> Judged | str:
    if any(verdict.get("unsafe") for verdict in verdicts):
        return "flagged unsafe"
    if sum(not verdict.get("skip") for verdict in verdicts) < options.min_judgements:
        return "too few judgements"
    return item, verdicts


def _ranked_rows(items: Iterator[Judged | str], options: ReleaseOptions) -> Kept:
    for entry in items:
        if isinstance(entry, str):
            yield entry
            continue
        item, verdicts = entry
        answers = [candidate["messages"] for candidate in item.candidates]
        yield from _pair_rows(preferences(verdicts), _origin(item), answers, options)


def _rated_rows(items: Iterator[Judged | str]) -> Kept:
    for entry in items:
        if isinstance(entry, str):
            yield entry
            continue
        item, verdicts = entry
        ratings = mean_ratings(verdicts)
        yield _origin(item) | {
            "completion": item.candidates[0]["messages"],
            "aspects": ratings,
            "scales": {aspect: [1, 5] for aspect in ratings},
        }


def _edited_rows(items: Iterator[Judged | str], options: ReleaseOptions) -> Kept:
    for entry in items:
        if isinstance(entry, str):
            yield entry
            continue
        item, verdicts = entry
        for at, verdict in enumerate(verdicts):
            if not verdict.get("edit"):
                continue
            better = [{"role": "assistant", "content": verdict["edit"]}]
            origin = _origin(item)
            origin["id"] += f".{at}" if at else ""
            if options.kind == "demonstration":
                prompt = origin.pop("prompt")
                yield origin | {"messages": prompt + better}
            else:
                yield origin | {"chosen": better, "rejected": item.candidates[0]["messages"]}


def _pairs_of_ratings(rows: Iterable[dict[str, Any]], options: ReleaseOptions) -> Kept:
    """All pairs of rated answers to the same prompt; the score is the mean over the aspects."""
    by_prompt: dict[bytes, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_prompt[orjson.dumps(row["prompt"])].append(row)
    for group in by_prompt.values():
        origin = {name: value for name, value in group[0].items() if name not in ("completion", "aspects", "scales")}
        scores = [sum(row["aspects"].values()) / len(row["aspects"]) for row in group]
        if len(group) == 1:
            yield "only one rated answer to the prompt"
        yield from _pair_rows(rated_pairs(scores), origin, [row["completion"] for row in group], options)


def _pair_rows(found: Iterable[Preferred], origin: dict[str, Any], answers: list[Any], options: ReleaseOptions) -> Kept:
    for pair, soft in keep(found, options.ties, options.disagreement):
        if isinstance(pair, str):
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
