"""Blind comparison of a run's models by people: items out of an evaluation, and the wins that come back.

The labelling pages show answers without the models' names, in an order drawn for each labeler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from steersman.errors import NotFoundError, meant
from steersman.report.schema import Evaluation, Sample, prompt_of
from steersman.report.wins import Duel
from steersman.store.items import NewItem
from steersman.store.models import Item, Judgement, Labeler, Project
from steersman.store.verdicts import Verdict


def items_of(evaluation: Evaluation, models: Sequence[str], prompts: int | None = None) -> Iterator[NewItem]:
    """Every two models' first answers to each prompt; equal answers are left out: there is nothing to prefer.

    Raises:
        NotFoundError: the evaluation has no such model.
    """
    missing = next((name for name in models if name not in evaluation.models), None)
    if missing is not None:
        known = evaluation.models
        raise NotFoundError(f"the evaluation has no model {missing}; it has {', '.join(known)}{meant(missing, known)}")
    first: dict[str, dict[str, Sample]] = {}
    for name in models:
        for sample in evaluation.models[name]:
            first.setdefault(name, {}).setdefault(prompt_of(sample.prompt_id), sample)
    for key in islice(first[models[0]], prompts):
        for one, other in combinations(models, 2):
            answers = {name: first[name][key].answer for name in (one, other)}
            if answers[one].strip() == answers[other].strip() or not all(text.strip() for text in answers.values()):
                continue
            yield NewItem(
                key=f"{evaluation.name}/{evaluation.seed}/{key}/{one}-{other}",
                prompt=[message.model_dump() for message in first[one][key].prompt],
                candidates=[
                    {"messages": [{"role": "assistant", "content": text}], "model": name}
                    for name, text in answers.items()
                ],
                meta={"run": evaluation.name, "prompt_id": key},
            )


def duels_of(session: Session, project: Project) -> list[Duel]:
    """Current verdicts on items whose candidates name their models: a duel a judgement, of a prompt as the unit."""
    rows = session.execute(
        sa.select(Judgement.verdict, Item.candidates, Item.meta, Item.key)
        .join(Item, Item.id == Judgement.item_id)
        .where(Judgement.project_id == project.id, Judgement.undone_at.is_(None))
        .order_by(Judgement.id)
    )
    found = []
    for verdict, candidates, meta, key in rows:
        said = Verdict.model_validate(verdict)
        names = [candidate.get("model") for candidate in candidates]
        if said.skip or said.ranking is None or len(set(names)) < len(names) or None in names:
            continue
        place = {index: rank for rank, group in enumerate(said.ranking) for index in group}
        for one, other in combinations(range(len(names)), 2):
            score = 0.5 if place[one] == place[other] else float(place[one] < place[other])
            found.append(Duel((meta or {}).get("prompt_id", key), str(names[one]), str(names[other]), score))
    return found


def rankings_of(
    session: Session, project: Project
) -> tuple[list[tuple[int, str, Sequence[Sequence[int]]]], dict[tuple[int, int], list[dict[str, Any]]]]:
    """Current verdicts as (item, labeler, ranking), and every judged answer in its conversation by item and place."""
    rows = session.execute(
        sa.select(Judgement.verdict, Item.id, Item.prompt, Item.candidates, Labeler.name)
        .join(Item, Item.id == Judgement.item_id)
        .join(Labeler, Labeler.id == Judgement.labeler_id)
        .where(Judgement.project_id == project.id, Judgement.undone_at.is_(None))
        .order_by(Judgement.id)
    )
    rankings: list[tuple[int, str, Sequence[Sequence[int]]]] = []
    answers: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for verdict, item, prompt, candidates, labeler in rows:
        said = Verdict.model_validate(verdict)
        if said.skip or said.ranking is None:
            continue
        rankings.append((item, labeler, said.ranking))
        for place, candidate in enumerate(candidates):
            answers.setdefault((item, place), [*prompt, *candidate["messages"]])
    return rankings, answers
