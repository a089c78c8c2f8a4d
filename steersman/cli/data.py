"""`steersman data`: import, export, generate, judge, release and delete feedback data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from steersman.cli import labelling
from steersman.cli.options import DEFAULT_STORE, JsonOption, StoreOption, parse_pairs

if TYPE_CHECKING:
    from steersman.cli.shapes import Imported
    from steersman.data.importing import ImportJob, Summary


T = TypeVar("T")

app = typer.Typer(help="Feedback data: import, export, agreement, release.", no_args_is_help=True)
app.add_typer(labelling.app)


def parse_shares(text: str) -> dict[str, float]:
    """`train=0.9,test=0.1` as a dictionary."""
    from steersman.errors import ConfigError

    try:
        return {name: float(share) for name, share in parse_pairs(text.split(","), "--splits").items()}
    except ValueError:
        raise ConfigError(f"--splits {text!r}: expected NAME=SHARE,..., as train=0.9,test=0.1") from None


def read_option(read: Callable[[str], T], value: str | None, option: str) -> T | None:
    """An option's value as `read` understands it."""
    from steersman.errors import ConfigError

    try:
        return None if value is None else read(value)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _separator(text: str) -> str:
    character = text.replace("\\t", "\t")
    if len(character) != 1 or character in '"\r\n':
        raise ValueError(f"{text!r} is no separator; expected one character, as ; or \\t")
    return character


@app.command("import")
def import_(
    format: Annotated[str, typer.Argument(help="Format; `steersman data formats` lists them.")],
    files: Annotated[
        list[str],
        typer.Argument(help="Files, folders, patterns, URLs, - for stdin; Hugging Face names with `--hugging-face`."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the rows, the summary and the skipped rows.")],
    splits: Annotated[str, typer.Option(help="Shares; a prompt lies on one side only.")] = "train=0.95,test=0.05",
    split_by: Annotated[str | None, typer.Option(help="Metadata key that stays on one side, as `intent`.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
    column: Annotated[list[str], typer.Option(help="`table` only: PART=COLUMN or PART=TEMPLATE.")] = [],  # noqa: B006
    winner: Annotated[list[str], typer.Option(help="`table` only: a=VALUE, b=VALUE, tie=VALUE.")] = [],  # noqa: B006
    header: Annotated[bool, typer.Option(help="CSV files begin with column names.")] = True,
    separator: Annotated[str | None, typer.Option(help="CSV: between columns; told from the file by default.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of text that is not UTF-8 and has no mark, as cp1252.")] = None,
    rows: Annotated[str, typer.Option(help="`steersman` only: the row type of canonical files.")] = "preference",
    language: Annotated[list[str], typer.Option(help="Languages to keep, where the format names them.")] = [],  # noqa: B006
    min_score_ratio: Annotated[float, typer.Option(help="SHP: leave out pairs below this score ratio.")] = 1.0,
    licence: Annotated[str | None, typer.Option(help="Licence of the rows, where it is not the format's own.")] = None,
    source: Annotated[str | None, typer.Option(help="Name of the source; the format's name by default.")] = None,
    customer: Annotated[str | None, typer.Option(help="Tenant whose data this is.")] = None,
    consent: Annotated[str | None, typer.Option(help="yes or no, for rows that say nothing themselves.")] = None,
    namespace: Annotated[str, typer.Option(help="Put before every id, so that sources stay apart.")] = "",
    near_duplicates: Annotated[
        float | None, typer.Option(help="Leave out rows as similar as this to an earlier one, as 0.8.")
    ] = None,
    hugging_face: Annotated[bool, typer.Option(help="FILES are ids or folders for the datasets library.")] = False,
    hugging_face_split: Annotated[str | None, typer.Option(help="Read this split only.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar, no summary.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Imports foreign data as canonical rows: streaming, without duplicates, split by prompt."""
    from steersman.cli.shapes import print_json
    from steersman.data.formats import FORMATS, ImportOptions
    from steersman.data.importing import ImportJob, import_to_folder
    from steersman.data.records import IncompleteFileError
    from steersman.data.splits import Splits
    from steersman.data.table import ColumnMap, canonical_format, table_format
    from steersman.data.truth import read_consent
    from steersman.errors import ConfigError, meant

    if (column or winner) and format != "table":
        raise ConfigError(f"--column, --winner: {format} knows its columns; only `table` takes a column map")
    if format == "table":
        winners = {"winners": parse_pairs(winner, "--winner")} if winner else {}
        chosen = table_format(ColumnMap(parse_pairs(column, "--column"), **winners))
    elif format == "steersman":
        chosen = canonical_format(rows)
    elif format in FORMATS:
        chosen = FORMATS[format]
    else:
        known = ("table", "steersman", *FORMATS)
        raise ConfigError(f"format {format!r}: unknown; known are {', '.join(known)}{meant(format, known)}")
    job = ImportJob(
        chosen,
        tuple(files),
        ImportOptions(frozenset(language), min_score_ratio),
        {
            "source": source or chosen.name,
            "licence": licence or chosen.licence,
            "customer": customer,
            "consent": read_option(read_consent, consent, "--consent"),
        },
        header,
        hugging_face,
        hugging_face_split,
        read_option(_separator, separator, "--separator"),
        encoding,
        namespace,
        near_duplicates,
    )
    shares = Splits(parse_shares(splits), seed=seed, by=split_by, salt="import")  # see store/drafts.py
    summary = import_to_folder(job, out, shares) if quiet or as_json else import_with_progress(job, out, shares)
    if as_json:
        print_json(_imported(summary, out))
    elif not quiet:
        print_summary(summary, out)
    if summary.incomplete:
        raise IncompleteFileError(
            f"{', '.join(summary.incomplete)}: the file ends there before its end; the rows before it are in {out}, "
            "fetch the file again for the rest"
        )


def import_with_progress(job: ImportJob, out: Path, splits: object) -> Summary:
    """Imports with a bar over the bytes of each file."""
    import os

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from steersman.data.importing import import_to_folder
    from steersman.data.opening import display_name, expand

    files = job.files if job.hugging_face else expand(job.files)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        sizes = {file: os.path.getsize(file) if os.path.exists(file) else None for file in files}
        tasks = {file: bar.add_task(display_name(file), total=size, start=False) for file, size in sizes.items()}

        def progress(file: str, position: int) -> None:
            bar.start_task(tasks[file])
            bar.update(tasks[file], completed=sizes[file] if position < 0 else position)

        return import_to_folder(job, out, splits, progress)  # type: ignore[arg-type]


def _imported(summary: Summary, out: Path) -> Imported:
    from steersman.cli.shapes import Imported

    return Imported(
        summary.format,
        str(out),
        summary.read,
        summary.written,
        dict(summary.splits),
        summary.duplicates,
        summary.near_duplicates,
        summary.ids_made_unique,
        summary.ungrouped,
        dict(summary.not_kept),
        {reason: entry.count for reason, entry in summary.skipped.items()},
        summary.incomplete,
    )


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
    if summary.near_duplicates:
        console.print(f"{summary.near_duplicates:,} near-duplicates removed")
    if summary.ids_made_unique:
        console.print(f"{summary.ids_made_unique:,} ids stood twice and got a number behind them")
    if summary.ungrouped:
        console.print(f"{summary.ungrouped:,} rows lack the key of --split-by and lie together on one side")
    for name, count in sorted(summary.not_kept.items()):
        console.print(f"not kept: field {name!r} of {count:,} records; rows of this format have no place for it")
    if summary.skipped:
        table = Table("left out", "why", "first at")
        for reason, entry in sorted(summary.skipped.items(), key=lambda item: -item[1].count):
            table.add_row(f"{entry.count:,}", reason, ", ".join(entry.first))
        console.print(table)
        console.print(f"every one of them: {out / 'skipped.jsonl'}")


@app.command()
def formats(as_json: JsonOption = False) -> None:
    """Lists the formats that `import` knows."""
    from rich.console import Console
    from rich.table import Table

    from steersman.cli.shapes import FormatLine, print_json
    from steersman.data.formats import FORMATS

    found = [
        FormatLine(
            entry.name, entry.row_type.__name__.lower() if entry.row_type else "any", entry.licence or "", entry.about
        )
        for entry in FORMATS.values()
    ]
    found.append(FormatLine("table", "by the columns", "", "JSONL, JSON, CSV, Parquet with a column map"))
    found.append(FormatLine("steersman", "--rows", "", "rows that have the canonical shape already"))
    if as_json:
        print_json(found)
        return
    table = Table("format", "rows", "licence of the public set", "about")
    for one in found:
        table.add_row(one.name, one.rows, one.licence or "-", one.about)
    Console().print(table)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Canonical rows, JSONL or Parquet.")],
    target: Annotated[Path, typer.Argument(help="File to write.")],
    to: Annotated[str, typer.Option(help="jsonl, parquet or label-studio.")] = "jsonl",
) -> None:
    """Writes canonical rows as JSONL, Parquet or Label Studio tasks."""
    from steersman.data import export as exporting

    count = exporting.export(source, target, to)
    typer.echo(f"{count:,} rows written to {target}")


@app.command()
def label_studio_config(
    rows: Annotated[str, typer.Argument(help="Row type of the exported file.")],
    aspect: Annotated[list[str], typer.Option(help="Aspects to rate.")] = [],  # noqa: B006
) -> None:
    """Prints the labelling configuration for Label Studio that fits exported tasks."""
    from steersman.data.export import label_studio_config as config
    from steersman.data.records import ROW_TYPES
    from steersman.errors import ConfigError, meant

    if rows not in ROW_TYPES:
        raise ConfigError(f"rows: {rows!r} is no row type; known are {', '.join(ROW_TYPES)}{meant(rows, ROW_TYPES)}")
    typer.echo(config(ROW_TYPES[rows], aspect))


@app.command()
def release(
    name: Annotated[str, typer.Argument(help="Name of the data set.")],
    source: Annotated[list[str], typer.Option(help="project:NAME, feedback, or a file of canonical rows.")],
    out: Annotated[Path, typer.Option(help="Folder of all releases.")] = Path("releases"),
    option: Annotated[list[str], typer.Option("--set", help="As ties=keep, pii.entities=email,name.")] = [],  # noqa: B006
    splits: Annotated[str, typer.Option(help="Shares; a prompt lies on one side only.")] = "train=0.95,test=0.05",
    threshold: Annotated[list[str], typer.Option(help="As min_alpha=0.6, instead of the projects'.")] = [],  # noqa: B006
    as_json: JsonOption = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Makes the next version of a data set; blocked when agreement misses a threshold."""
    from pydantic import ValidationError

    from steersman.data.records import describe_validation_error
    from steersman.data.rules import ReleaseOptions
    from steersman.errors import ConfigError
    from steersman.store import Store
    from steersman.store.releases import publish

    values: dict[str, object] = {"name": name, "sources": source, "splits": parse_shares(splits)}
    for key, value in parse_pairs(option, "--set").items():
        group, dot, inner = key.partition(".")
        listed = inner in ("entities", "regions", "keep") or key in ("customers", "exclude_customers", "licences")
        given = [part for part in value.split(",") if part] if listed else value
        if dot:
            values.setdefault(group, {})[inner] = given  # type: ignore[index]
        else:
            values[key] = given
    if threshold:
        values["thresholds"] = parse_pairs(threshold, "--threshold")
    try:
        options = ReleaseOptions.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"release {describe_validation_error(error)}") from None
    made, created = publish(Store.open(store), options, out)
    card = made.card
    if as_json:
        from steersman.cli.shapes import Released, print_json

        counts = (card["rows"], card["splits"], made.digest, made.url, card["left out"], card["scrubbed"])
        print_json(Released(name, made.version, created, *counts, card["empty splits"]))
        return
    typer.echo(
        f"{name} v{made.version}: {'made' if created else 'nothing changed since'}; {card['rows']:,} rows "
        f"({', '.join(f'{split} {n:,}' for split, n in card['splits'].items())}), SHA-256 {made.digest}, {made.url}"
    )
    for reason, count in card["left out"].items():
        typer.echo(f"  left out: {count:,} x {reason}")
    for tag, count in card["scrubbed"].items():
        typer.echo(f"  replaced: {count:,} x {tag}, as in ...{card['scrubbed samples'][tag][0]}")
    for split in card["empty splits"]:
        typer.echo(f"  split {split} is empty: too few prompts for its share")


@app.command()
def releases(as_json: JsonOption = False, store: StoreOption = DEFAULT_STORE) -> None:
    """Lists the releases and checks their files."""
    import sqlalchemy as sa
    from rich.console import Console
    from rich.table import Table

    from steersman.cli.shapes import ReleaseLine, print_json
    from steersman.errors import SteersmanError
    from steersman.store import Store
    from steersman.store.models import Release
    from steersman.store.releases import verify

    def line(found: Release) -> ReleaseLine:
        try:
            verify(found)
            state = "good"
        except SteersmanError as error:
            state = error.message
        made, rows = found.created_at.isoformat(timespec="minutes"), found.card["rows"]
        return ReleaseLine(found.name, found.version, rows, made, state == "good", state, found.url)

    with Store.open(store).reading() as session:
        lines = [line(found) for found in session.scalars(sa.select(Release).order_by(Release.name, Release.version))]
    if as_json:
        print_json(lines)
        return
    table = Table("release", "rows", "made", "state", "folder")
    for one in lines:
        table.add_row(f"{one.name} v{one.version}", f"{one.rows:,}", one.made, one.state, one.folder)
    Console().print(table)


@app.command()
def trained(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    as_json: JsonOption = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Records on which releases the models of a run were trained, by the hashes of its data files."""
    from steersman.cli.shapes import Trained, print_json
    from steersman.store import Store
    from steersman.store.releases import record_run

    with Store.open(store).transaction() as session:
        found = [Trained(stage, release.name, release.version) for stage, release in record_run(session, run)]
    if as_json:
        print_json(found)
        return
    for one in found:
        typer.echo(f"{one.stage} of {run.resolve().name} was trained on {one.release} v{one.version}")
    if not found:
        typer.echo(f"no data file of {run} is one of a release in this store")


@app.command()
def trained_elsewhere(
    name: str,
    version: int,
    run: Annotated[str, typer.Option(help="Name of the run.")],
    model: Annotated[str, typer.Option(help="Name and version of the model.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Records that a model was trained on a release by other means than a run of Steersman."""
    from steersman.store import Store
    from steersman.store.releases import get_release, record_training

    with Store.open(store).transaction() as session:
        record_training(session, get_release(session, name, version), run, model)
    typer.echo(f"{model} of {run} was trained on {name} v{version}")


@app.command()
def delete_customer(
    customer: Annotated[str, typer.Argument(help="The tenant.")],
    end_customer: Annotated[
        str | None, typer.Option(help="Only this end customer of the tenant: the key in its business systems.")
    ] = None,
    secret_file: Annotated[
        Path | None, typer.Option(help="The gateway's secretFile; beside SQLite it is found.")
    ] = None,
    secret_env: Annotated[str | None, typer.Option(help="The gateway's secretEnv.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Deletes a tenant's or an end customer's data, makes new versions without it, lists the models trained on it."""
    from steersman.store import Store
    from steersman.store import releases as register
    from steersman.store.secret import pseudonym, read_secret

    whose = repr(customer) if end_customer is None else f"end customer {end_customer!r} of {customer!r}"
    opened = Store.open(store)
    subject = register.Subject(customer)
    if end_customer is not None:
        name = pseudonym(read_secret(opened, secret_file, secret_env), customer, end_customer)
        subject = register.Subject(customer, name, end_customer)
    if not yes:
        with opened.reading() as session:
            held = register.holdings(session, subject)
        found = f"{held.items:,} items, {held.answers:,} answers and {held.rows:,} rows of releases"
        typer.confirm(f"Delete all data of {whose} ({found})? This cannot be undone.", abort=True, err=as_json)
    report = register.delete_customer(opened, subject)
    if as_json:
        from steersman.cli.shapes import Deleted, print_json

        gone = (report.items, report.answers, report.remembered, report.new_versions, report.withdrawn)
        print_json(Deleted(customer, *gone, report.models, report.files))
        return
    typer.echo(f"{report.items:,} items, {report.answers:,} answers and {report.remembered:,} kept turns deleted")
    for name, version in report.new_versions.items():
        typer.echo(f"{name}: {'no row is left' if version is None else f'use v{version}'}")
    typer.echo(f"withdrawn, files erased: {', '.join(report.withdrawn) or 'none'}")
    for entry in report.models:
        typer.echo(f"trained on deleted data: {entry['model']} of {entry['run']} (on {entry['release']})")
    if report.files:
        typer.echo(f"remove the rows from these files too: {', '.join(report.files)}")


@app.command()
def allow_customer(
    customer: Annotated[str, typer.Argument(help="A tenant whose data was deleted.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Takes new data of a deleted tenant again: undoes the block, not the deletion."""
    from steersman.store import Store
    from steersman.store.releases import allow_customer as allow

    with Store.open(store).transaction() as session:
        allow(session, customer)
    typer.echo(f"rows of {customer} may be released again; what was deleted stays deleted")
