"""Pages of one file each, in the report's style: suites, and comparisons of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from steersman.report.evidence import judged_wins
from steersman.report.schema import JudgeResult, LicenceResult
from steersman.report.summary import label
from steersman.suites.asked import SuiteReport, SuiteResult
from steersman.suites.verdicts import by_check, change, earlier_of, failures, lines


def environment() -> Environment:
    """Templates with the filters that all pages use."""
    made = Environment(
        loader=PackageLoader("steersman.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(label=label, number=number, signed=signed, p_value=p_value)
    return made


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def flat(value: Any, path: str = "spec") -> dict[str, str]:
    """Fields of a document by their dotted paths, as text."""
    if isinstance(value, Mapping) and value:
        return {name: text for key, part in value.items() for name, text in flat(part, f"{path}.{key}").items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return {name: text for at, part in enumerate(value) for name, text in flat(part, f"{path}.{at}").items()}
    return {path: "not set" if value is None else str(value)}


def write_suites(
    report: SuiteReport,
    out: Path,
    earlier: SuiteReport | None = None,
    judged: Mapping[str, JudgeResult] = {},
    licences: Mapping[str, LicenceResult] = {},
) -> Path:
    """Writes `suites.html` and returns its path.

    Args:
        earlier: results of the version before; None: the first target is what the others are compared with.
        judged: what LLM judges said of the targets' answers.
    """
    rows = suite_rows(report.results, earlier.results if earlier is not None else ())
    path = out / "suites.html"
    path.write_text(
        environment().get_template("suites.html.j2").render(
            report=report, earlier=earlier, rows=rows, headline=_headline(rows),
            targets=list(dict.fromkeys(result.target for result in report.results)),
            wins=judged_wins(judged, _compared(report, judged)), licences=licences,
        ),
        encoding="utf-8",
    )  # fmt: skip
    return path


def _compared(report: SuiteReport, judged: Mapping[str, JudgeResult]) -> list[str]:
    """The versions that judges compared, in the order of the results."""
    said = dict.fromkeys(name for one in judged.values() for pair in one.pairs for name in (pair.other, pair.one))
    targets = dict.fromkeys(result.target for result in report.results)
    return [name for name in {**targets, **said} if name in said]


def suite_rows(results: tuple[SuiteResult, ...], earlier: tuple[SuiteResult, ...] = ()) -> list[dict[str, Any]]:
    """What the template shows of every result."""
    rows = []
    for result in results:
        before = earlier_of(result, earlier) if earlier else _first_of(result, results)
        asked = len(result.asked)
        rows.append(
            {
                "result": result,
                "anchor": re.sub(r"\W+", "-", f"{result.suite}-{result.target}-{result.decoding}"),
                "lines": lines(result, before),
                "checks": by_check(result),
                "before": before,
                "change": change(before, result) if before is not None else None,
                "failures": failures(result),
                "tokens": sum(one.tokens for one in result.asked) / asked,
                "seconds": sum(one.seconds for one in result.asked) / asked,
            }
        )
    return rows


def _first_of(result: SuiteResult, results: tuple[SuiteResult, ...]) -> SuiteResult | None:
    """The first target's result of the same suite and decoding, which later targets are compared with."""
    first = next(one for one in results if (one.suite, one.decoding) == (result.suite, result.decoding))
    return first if first is not result else None


def _headline(rows: list[dict[str, Any]]) -> str:
    said = [
        f"{row['result'].target} passes {sum(row['result'].scores.values()):g} of {len(row['result'].scores)} cases of "
        f"{row['result'].suite} ({row['result'].decoding})"
        for row in rows[:4]
    ]
    worse = sum(len(row["change"].worse) for row in rows if row["change"])
    text = "; ".join(said) + ("." if len(rows) <= 4 else "; and others below.")
    return text + (f" {worse} cases are worse than in what they are compared with." if worse else "")
