"""The agreement report of a project, read from the running counts: its cost does not grow with the judgements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.orm import Session

from steersman.data.agreement import (
    AgreementReport,
    DayFigures,
    Items,
    LabelerFigures,
    Level,
    PairFigures,
    Pattern,
    Patterns,
    QuestionAgreement,
    bootstrap_intervals,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    order_bias,
    raw_agreement,
    share_interval,
    units_of,
)
from steersman.store.judging import disputed
from steersman.store.models import AgreementDay, Item, Labeler, LabelerDay, Project, UnitPattern, VotePair
from steersman.store.tallies import decode_patterns


def agreement_report(session: Session, project: Project, tenant: str | None = None) -> AgreementReport:
    """All figures of a project. Preferences are nominal, ratings ordinal.

    Args:
        session: A reading session.
        project: Whose figures.
        tenant: Who looks: the names of other tenants' labelers are not shown.
    """
    names = {
        id: name if tenant in (None, customer) or not customer else f"somebody else {id}"
        for id, name, customer in session.execute(sa.select(Labeler.id, Labeler.name, Labeler.customer))
    }
    confusion: Confusion = defaultdict(dict)
    pairs = sa.select(
        VotePair.question, VotePair.labeler_a, VotePair.labeler_b, VotePair.value_a, VotePair.value_b, VotePair.n
    ).where(VotePair.project_id == project.id, VotePair.n > 0)
    for question, one, two, value_a, value_b, n in session.execute(pairs):  # thousands: tuples, not objects
        confusion[question, one, two][value_a, value_b] = n
    labelers, total = _labelers(session, project, names, confusion)
    first, p_value = order_bias(total["decided"], total["decided_first"])
    return AgreementReport(
        project=project.name,
        judgements=total["judgements"] - total["skipped"],
        honeypots=total["honeypots"],
        honeypot_accuracy=_share(total["honeypots_right"], total["honeypots"]),
        first_share=first,
        first_p_value=p_value,
        intervals={
            name: interval
            for name, interval in (
                ("honeypot_accuracy", share_interval(total["honeypots_right"], total["honeypots"])),
                ("first_share", share_interval(total["decided_first"], total["decided"])),
            )
            if interval is not None
        },
        questions=_questions(session, project, confusion),
        labelers=labelers,
        pairs=[
            PairFigures(
                question=question,
                first=names[one],
                second=names[two],
                units=sum(counts.values()),
                raw=sum(n for (a, b), n in counts.items() if a == b) / sum(counts.values()),
                kappa=cohen_kappa(counts, weighted=question != "preference"),
            )
            for (question, one, two), counts in sorted(confusion.items())
        ],
        days=[
            DayFigures(question=row.question, day=row.day.isoformat(), pairs=row.pairs, raw=row.agreeing / row.pairs)
            for row in session.scalars(
                sa.select(AgreementDay)
                .where(AgreementDay.project_id == project.id, AgreementDay.pairs > 0)
                .order_by(AgreementDay.question, AgreementDay.day)
            )
        ],
    )


def disputed_items(session: Session, project: Project, limit: int = 20, tenant: str | None = None) -> list[Item]:
    """The items on which labelers disagree most, of those that the tenant may see."""
    return list(session.scalars(disputed(project, limit, tenant)))


Confusion = dict[tuple[str, int, int], dict[tuple[float, float], int]]


def _questions(session: Session, project: Project, confusion: Confusion) -> list[QuestionAgreement]:
    items: dict[str, dict[tuple[Pattern, ...], int]] = defaultdict(dict)
    for row in session.scalars(
        sa.select(UnitPattern)
        .where(UnitPattern.project_id == project.id, UnitPattern.n > 0)
        .order_by(UnitPattern.question, UnitPattern.pattern)
    ):
        items[row.question][decode_patterns(row.pattern)] = row.n
    labelers: dict[str, set[int]] = defaultdict(set)
    for question, one, two in confusion:
        labelers[question] |= {one, two}
    return [
        _question(question, found, len(labelers[question]))
        for question, found in items.items()
        if raw_agreement(units_of(found))[0]
    ]


def _question(question: str, items: Items, labelers: int) -> QuestionAgreement:
    patterns = units_of(items)
    level: Level = "nominal" if question == "preference" else "ordinal"
    pairs, agreeing = raw_agreement(patterns)
    fleiss, fleiss_units, fleiss_votes = fleiss_kappa(patterns)
    statistics: dict[str, Callable[[Patterns], float | None]] = {
        "raw": lambda sample: _share(*reversed(raw_agreement(sample))),
        "alpha": lambda sample: krippendorff_alpha(sample, level),
        "fleiss": lambda sample: fleiss_kappa(sample)[0],
    }
    return QuestionAgreement(
        question=question,
        units=sum(n for pattern, n in patterns.items() if sum(count for _, count in pattern) > 1),
        pairs=pairs,
        raw=_share(agreeing, pairs),
        alpha=krippendorff_alpha(patterns, level),
        level=level,
        fleiss=fleiss,
        fleiss_units=fleiss_units,
        fleiss_votes=fleiss_votes,
        items=sum(n for units, n in items.items() if any(sum(count for _, count in pattern) > 1 for pattern in units)),
        labelers=labelers,
        intervals=bootstrap_intervals(items, statistics),
    )


def _labelers(
    session: Session,
    project: Project,
    names: dict[int, str],
    confusion: Confusion,
) -> tuple[list[LabelerFigures], dict[str, int]]:
    votes: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for (_, one, two), counts in confusion.items():
        for labeler in (one, two):
            votes[labeler][0] += sum(counts.values())
            votes[labeler][1] += sum(n for (a, b), n in counts.items() if a == b)
    columns = [column for column in LabelerDay.__table__.columns if not column.primary_key]
    sums = [sa.func.coalesce(sa.func.sum(column), 0).label(column.name) for column in columns]
    total: dict[str, int] = defaultdict(int)
    figures = []
    for row in session.execute(
        sa.select(LabelerDay.labeler_id, *sums)
        .where(LabelerDay.project_id == project.id)
        .group_by(LabelerDay.labeler_id)
        .order_by(LabelerDay.labeler_id)
    ).mappings():
        for column in columns:
            total[column.name] += int(row[column.name])
        first, p_value = order_bias(int(row["decided"]), int(row["decided_first"]))
        pairs, agreeing = votes[row["labeler_id"]]
        seconds = _share(int(row["milliseconds"]), int(row["judgements"]))
        figures.append(
            LabelerFigures(
                labeler=names[row["labeler_id"]],
                judgements=row["judgements"],
                skipped=row["skipped"],
                unsafe=row["unsafe"],
                agreement=_share(agreeing, pairs),
                honeypots=row["honeypots"],
                honeypot_accuracy=_share(int(row["honeypots_right"]), int(row["honeypots"])),
                first_share=first,
                first_p_value=p_value,
                seconds_per_item=None if seconds is None else seconds / 1000,
            )
        )
    return figures, total


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
