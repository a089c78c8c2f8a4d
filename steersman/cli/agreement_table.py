"""The agreement report on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from steersman.data.agreement import AgreementReport


def print_report(report: AgreementReport, failures: list[str]) -> None:
    """Prints the tables of a report and what blocks a release."""
    console = Console()
    console.print(
        f"{report.project}: {report.judgements:,} judgements; honeypots right {_number(report.honeypot_accuracy)} "
        f"of {report.honeypots:,}; first shown wins {_number(report.first_share)} (p = {_number(report.first_p_value)})"
    )
    table = Table("question", "units", "agreeing pairs", "alpha", "level", "Fleiss' kappa", "units x votes")
    for question in report.questions:
        table.add_row(
            question.question,
            f"{question.units:,}",
            _number(question.raw),
            _number(question.alpha),
            question.level,
            _number(question.fleiss),
            f"{question.fleiss_units:,} x {question.fleiss_votes}",
        )
    console.print(table)
    table = Table("labeler", "judged", "skipped", "unsafe", "agrees", "honeypots", "first shown wins", "s/item")
    for labeler in report.labelers:
        table.add_row(
            labeler.labeler,
            f"{labeler.judgements - labeler.skipped:,}",
            f"{labeler.skipped:,}",
            f"{labeler.unsafe:,}",
            _number(labeler.agreement),
            f"{_number(labeler.honeypot_accuracy)} of {labeler.honeypots}",
            f"{_number(labeler.first_share)} (p = {_number(labeler.first_p_value)})",
            "-" if labeler.seconds_per_item is None else f"{labeler.seconds_per_item:.1f}",
        )
    console.print(table)
    table = Table("question", "labelers", "units", "agreeing", "Cohen's kappa")
    for pair in report.pairs:
        table.add_row(
            pair.question, f"{pair.first}, {pair.second}", f"{pair.units:,}", _number(pair.raw), _number(pair.kappa)
        )
    console.print(table)
    table = Table("day", "question", "pairs", "agreeing")
    for day in report.days:
        table.add_row(day.day, day.question, f"{day.pairs:,}", _number(day.raw))
    console.print(table)
    for failure in failures:
        console.print(f"[red]blocks a release:[/red] {failure}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
