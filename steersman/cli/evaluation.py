"""`steersman eval` and `steersman compare`: is it better, and where not?"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from steersman.suites.asked import SuiteResult

SUITES_FILE = "suites.json"


def evaluate(
    targets: Annotated[list[str], typer.Argument(help="Model folders, runs' folders, or URLs that end with /v1.")],
    suite: Annotated[list[Path], typer.Option(help="YAML or JSONL with conversations; repeatable.")],
    decoding: Annotated[
        list[str], typer.Option(help="greedy, served (the endpoint's own), or a temperature; repeatable.")
    ] = ["greedy", "served"],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Answers to a case; a greedy one is drawn once.", min=1, max=1000)] = 1,
    max_tokens: Annotated[int, typer.Option(help="Token limit of an answer.", min=1, max=100_000)] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 17,
    concurrency: Annotated[int, typer.Option(help="Conversations at a time.", min=1, max=256)] = 4,
    previous: Annotated[Path | None, typer.Option(help="suites.json of the version before, to compare with.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for suites.json and suites.html.")] = Path("evaluation"),
    model: Annotated[str | None, typer.Option(help="Model's name at the endpoints; the first one by default.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoints' API key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Asks suites of models, runs and endpoints: results by tag, and what changed."""
    from steersman.artifacts import storage_errors
    from steersman.errors import ConfigError
    from steersman.local.evaluate import ask_all
    from steersman.report.pages import write_suites
    from steersman.suites.asked import SuiteReport, read_results
    from steersman.suites.asking import Decoding
    from steersman.suites.schema import read_suite

    suites = [read_suite(path) for path in suite]
    double = next((one.name for one in suites if [other.name for other in suites].count(one.name) > 1), None)
    if double is not None:
        raise ConfigError(f"two suites have the name {double}; results are compared by it")
    decodings = list({name: Decoding.parse(name) for name in decoding}.values())
    earlier = read_results(previous) if previous is not None else None
    results = ask_all(
        targets, suites, decodings, samples=samples, max_tokens=max_tokens, seed=seed, concurrency=concurrency,
        model=model, key_env=key_env,
    )  # fmt: skip
    settings = {
        "targets": targets, "suites": [str(path) for path in suite], "decoding": [one.name for one in decodings],
        "samples": samples, "max_tokens": max_tokens, "seed": seed, "previous": str(previous) if previous else None,
    }  # fmt: skip
    report = SuiteReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"), settings=settings, results=tuple(results)
    )
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / SUITES_FILE).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    page = write_suites(report, out, earlier)
    from rich.console import Console

    before = earlier.results if earlier is not None else ()
    for result in results:
        Console().print(_table(result, before))
    typer.echo(f"{page}")
    if as_json:
        typer.echo(json.dumps(summary(results, before)))


def summary(results: list[SuiteResult], earlier: Any = ()) -> dict[str, Any]:
    """Shares [estimate, low, high] by target, suite, decoding and tag, and the cases that changed."""
    from steersman.suites.verdicts import change, earlier_of, lines

    found: dict[str, Any] = {}
    for result in results:
        before = earlier_of(result, earlier)
        entry: dict[str, Any] = {line.name: [round(x, 4) for x in line.share] for line in lines(result)}
        numbers: dict[str, Any] = {"shares": entry, "errors": sum(one.error is not None for one in result.asked)}
        if before is not None:
            changed = change(before, result)
            numbers["worse"], numbers["better"] = list(changed.worse), list(changed.better)
        found.setdefault(result.target, {}).setdefault(result.suite, {})[result.decoding] = numbers
    return found


def _table(result: SuiteResult, earlier: Any) -> Table:
    from rich.table import Table

    from steersman.suites.verdicts import change, earlier_of, lines

    before = earlier_of(result, earlier)
    caption = ""
    if before is not None:
        changed = change(before, result)
        caption = f"against the version before: {len(changed.worse)} cases worse, {len(changed.better)} better"
        caption += f" (p = {changed.p_value:.3f})" + "".join(f"\n  worse: {case}" for case in changed.worse[:10])
    table = Table(
        title=f"{result.target}: {result.suite}, {result.decoding}", caption=caption or None, title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    for title in ("", "passed", "95% interval", "cases", *(["before"] if before else [])):
        table.add_column(title, justify="left" if not title else "right")
    for line in lines(result, before):
        cells = [line.name, f"{line.share.estimate:.1%}", f"{line.share.low:.1%} to {line.share.high:.1%}",
                 str(line.cases)]  # fmt: skip
        if before:
            cells.append("–" if line.before is None else f"{line.before.estimate:.1%}")
        table.add_row(*cells)
    return table
