"""`steersman data`: import, export, generate, judge, release and delete feedback data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from steersman.data.importing import ImportJob, Summary

app = typer.Typer(help="Feedback data: import, export, agreement, release.", no_args_is_help=True)


def parse_pairs(values: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE options as a dictionary."""
    from steersman.errors import ConfigError

    pairs = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option} {value!r}: expected NAME=VALUE")
        pairs[name.strip()] = rest.strip().strip('"').replace("\\n", "\n")
    return pairs


def parse_shares(text: str) -> dict[str, float]:
    """`train=0.9,test=0.1` as a dictionary."""
    from steersman.errors import ConfigError

    try:
        return {name: float(share) for name, share in parse_pairs(text.split(","), "--splits").items()}
    except ValueError:
        raise ConfigError(f"--splits {text!r}: expected NAME=SHARE,..., as train=0.9,test=0.1") from None


@app.command("import")
def import_(
    format: Annotated[str, typer.Argument(help="Format; `steersman data formats` lists them.")],
    files: Annotated[list[str], typer.Argument(help="Files, URLs, or Hugging Face names with `--hugging-face`.")],
    out: Annotated[Path, typer.Option(help="New folder for the rows, the summary and the skipped rows.")],
    splits: Annotated[str, typer.Option(help="Shares; a prompt lies on one side only.")] = "train=0.95,test=0.05",
    split_by: Annotated[str | None, typer.Option(help="Metadata key that stays on one side, as `intent`.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
    column: Annotated[list[str], typer.Option(help="`table` only: PART=COLUMN or PART=TEMPLATE.")] = [],  # noqa: B006
    winner: Annotated[list[str], typer.Option(help="`table` only: a=VALUE, b=VALUE, tie=VALUE.")] = [],  # noqa: B006
    header: Annotated[bool, typer.Option(help="CSV files begin with column names.")] = True,
    rows: Annotated[str, typer.Option(help="`steersman` only: the row type of canonical files.")] = "preference",
    language: Annotated[list[str], typer.Option(help="Languages to keep, where the format names them.")] = [],  # noqa: B006
    min_score_ratio: Annotated[float, typer.Option(help="SHP: leave out pairs below this score ratio.")] = 1.0,
    licence: Annotated[str | None, typer.Option(help="Licence of the rows, where it is not the format's own.")] = None,
    source: Annotated[str | None, typer.Option(help="Name of the source; the format's name by default.")] = None,
    customer: Annotated[str | None, typer.Option(help="Tenant whose data this is.")] = None,
    hugging_face: Annotated[bool, typer.Option(help="FILES are ids or folders for the datasets library.")] = False,
    hugging_face_split: Annotated[str | None, typer.Option(help="Read this split only.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar, no summary.")] = False,
) -> None:
    """Imports foreign data as canonical rows: streaming, without duplicates, split by prompt."""
    from steersman.data.formats import FORMATS, ImportOptions
    from steersman.data.importing import ImportJob, import_to_folder
    from steersman.data.splits import Splits
    from steersman.data.table import ColumnMap, canonical_format, table_format
    from steersman.errors import ConfigError

    if format == "table":
        winners = {"winners": parse_pairs(winner, "--winner")} if winner else {}
        chosen = table_format(ColumnMap(parse_pairs(column, "--column"), **winners))
    elif format == "steersman":
        chosen = canonical_format(rows)
    elif format in FORMATS:
        chosen = FORMATS[format]
    else:
        raise ConfigError(f"format {format!r}: unknown; known are table, steersman, {', '.join(FORMATS)}")
    job = ImportJob(
        chosen,
        tuple(files),
        ImportOptions(frozenset(language), min_score_ratio),
        {"source": source or chosen.name, "licence": licence or chosen.licence, "customer": customer},
        header,
        hugging_face,
        hugging_face_split,
    )
    shares = Splits(parse_shares(splits), seed=seed, by=split_by)
    if quiet:
        import_to_folder(job, out, shares)
    else:
        print_summary(import_with_progress(job, out, shares), out)


def import_with_progress(job: ImportJob, out: Path, splits: object) -> Summary:
    """Imports with a bar over the bytes of each file."""
    import os

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from steersman.data.importing import import_to_folder

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        sizes = {file: os.path.getsize(file) if os.path.exists(file) else None for file in job.files}
        tasks = {file: bar.add_task(os.path.basename(file), total=size, start=False) for file, size in sizes.items()}

        def progress(file: str, position: int) -> None:
            bar.start_task(tasks[file])
            bar.update(tasks[file], completed=sizes[file] if position < 0 else position)

        return import_to_folder(job, out, splits, progress)  # type: ignore[arg-type]


def print_summary(summary: Summary, out: Path) -> None:
    """What was read, written and left out, and why."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    splits = ", ".join(f"{name} {count:,}" for name, count in sorted(summary.splits.items()))
    console.print(
        f"{summary.format}: {summary.read:,} records read, {summary.written:,} rows written to {out} ({splits}), "
        f"{summary.duplicates:,} duplicates removed, {summary.skips:,} left out"
    )
    if summary.skipped:
        table = Table("left out", "why", "first at")
        for reason, entry in sorted(summary.skipped.items(), key=lambda item: -item[1].count):
            table.add_row(f"{entry.count:,}", reason, ", ".join(entry.first))
        console.print(table)
        console.print(f"every one of them: {out / 'skipped.jsonl'}")


@app.command()
def formats() -> None:
    """Lists the formats that `import` knows."""
    from rich.console import Console
    from rich.table import Table

    from steersman.data.formats import FORMATS

    table = Table("format", "rows", "licence of the public set", "about")
    for entry in FORMATS.values():
        table.add_row(entry.name, entry.row_type.__name__.lower(), entry.licence or "-", entry.about)
    table.add_row("table", "by the columns", "-", "JSONL, JSON, CSV, Parquet with a column map")
    table.add_row("steersman", "--rows", "-", "rows that have the canonical shape already")
    Console().print(table)


if __name__ == "__main__":
    app()
