"""`steersman data`: import, export, generate, judge, release and delete feedback data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from steersman.data.importing import ImportJob, Summary

DEFAULT_STORE = "sqlite:///steersman.db"
StoreOption = Annotated[str, typer.Option(envvar="STEERSMAN_STORE", help="Database URL.")]

T = TypeVar("T")

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


def read_option(read: Callable[[str], T], value: str | None, option: str) -> T | None:
    """An option's value as `read` understands it."""
    from steersman.errors import ConfigError

    try:
        return None if value is None else read(value)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


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
) -> None:
    """Imports foreign data as canonical rows: streaming, without duplicates, split by prompt."""
    from steersman.data.formats import FORMATS, ImportOptions
    from steersman.data.importing import ImportJob, import_to_folder
    from steersman.data.records import IncompleteFileError
    from steersman.data.splits import Splits
    from steersman.data.table import ColumnMap, canonical_format, table_format
    from steersman.data.truth import read_consent
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
        {
            "source": source or chosen.name,
            "licence": licence or chosen.licence,
            "customer": customer,
            "consent": read_option(read_consent, consent, "--consent"),
        },
        header,
        hugging_face,
        hugging_face_split,
        separator,
        namespace,
        near_duplicates,
    )
    shares = Splits(parse_shares(splits), seed=seed, by=split_by)
    summary = import_to_folder(job, out, shares) if quiet else import_with_progress(job, out, shares)
    if not quiet:
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
    for name, count in sorted(summary.not_kept.items()):
        console.print(f"not kept: field {name!r} of {count:,} records; rows of this format have no place for it")
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
        kind = entry.row_type.__name__.lower() if entry.row_type else "any"
        table.add_row(entry.name, kind, entry.licence or "-", entry.about)
    table.add_row("table", "by the columns", "-", "JSONL, JSON, CSV, Parquet with a column map")
    table.add_row("steersman", "--rows", "-", "rows that have the canonical shape already")
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
    from steersman.errors import ConfigError

    if rows not in ROW_TYPES:
        raise ConfigError(f"rows: {rows!r} is no row type; known are {', '.join(ROW_TYPES)}")
    typer.echo(config(ROW_TYPES[rows], aspect))


def read_thresholds(values: list[str]) -> dict[str, Any]:
    """`--threshold NAME=NUMBER` options, checked; only what was given."""
    from pydantic import ValidationError

    from steersman.data.agreement import Thresholds
    from steersman.data.records import describe_validation_error
    from steersman.errors import ConfigError

    try:
        return Thresholds.model_validate(parse_pairs(values, "--threshold")).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ConfigError(f"--threshold {describe_validation_error(error)}") from None


@app.command()
def create_project(
    name: str,
    kind: Annotated[str, typer.Argument(help="compare, rank, rate or edit.")],
    guidelines: Annotated[Path | None, typer.Option(help="Markdown file, shown beside the task.")] = None,
    aspect: Annotated[list[str], typer.Option(help="rate: aspects, each judged 1 to 5.")] = [],  # noqa: B006
    overlap: Annotated[int, typer.Option(help="Labelers for each item.")] = 3,
    honeypot_every: Annotated[int, typer.Option(help="Every n-th task has a known answer; 0 never.")] = 0,
    threshold: Annotated[list[str], typer.Option(help="As min_alpha=0.6; blocks releases.")] = [],  # noqa: B006
    customer: Annotated[str, typer.Option(help="The tenant whose labelers see it, with all its items.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Makes a labelling project; one of no tenant is shared, each labeler sees the items of the own tenant."""
    from steersman.store import Store, judging

    with Store.open(store).transaction() as session:
        judging.create_project(
            session,
            name,
            kind,
            guidelines=guidelines.read_text() if guidelines else "",
            aspects=aspect,
            overlap=overlap,
            honeypot_every=honeypot_every,
            thresholds=read_thresholds(threshold),
            customer=customer,
        )
    typer.echo(f"project {name} made")


@app.command()
def projects(store: StoreOption = DEFAULT_STORE) -> None:
    """Lists the labelling projects."""
    import sqlalchemy as sa
    from rich.console import Console
    from rich.table import Table

    from steersman.store import Store
    from steersman.store.models import Item, LabelerDay, Project

    items = sa.select(sa.func.count()).where(Item.project_id == Project.id).scalar_subquery()
    judged = (
        sa.select(sa.func.coalesce(sa.func.sum(LabelerDay.judgements), 0))
        .where(LabelerDay.project_id == Project.id)
        .scalar_subquery()
    )
    table = Table("project", "kind", "overlap", "items", "judgements")
    with Store.open(store).reading() as session:
        for project, item_count, judgements in session.execute(
            sa.select(Project, items, judged).order_by(Project.name)
        ):
            table.add_row(project.name, project.kind, str(project.overlap), f"{item_count:,}", f"{int(judgements):,}")
    Console().print(table)


@app.command()
def add(
    project: str,
    files: Annotated[list[str], typer.Argument(help="Canonical rows; a preference gives two candidates.")],
    honeypots: Annotated[bool, typer.Option("--honeypots", help="The rows' own judgements are known answers.")] = False,
    namespace: Annotated[str, typer.Option(help="Put before every id, so that sources stay apart.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Adds rows with answers to a project as items to be judged, or as honeypots that measure the labelers."""
    from dataclasses import replace

    from steersman.data.export import read_any
    from steersman.data.opening import expand
    from steersman.store import Store
    from steersman.store.judging import Added, get_project, honeypot_of_row, item_of_row
    from steersman.store.judging import add as add_to

    make = honeypot_of_row if honeypots else item_of_row
    total = Added()
    with Store.open(store).transaction() as session:
        target = get_project(session, project)
        for file in expand(files):
            items = (make(row) for row in read_any(file))
            if namespace:
                items = (replace(item, key=f"{namespace.rstrip('/')}/{item.key}") for item in items)
            added = add_to(session, target, items)
            total = Added(*(getattr(total, name) + getattr(added, name) for name in vars(added)))
    said = total.describe()
    what = "honeypots" if honeypots else "items"
    typer.echo(f"{total.new:,} {what} added to {project}{f'; {said}' if said else ''}")


@app.command()
def generate(
    project: str,
    prompts: Annotated[str, typer.Argument(help="Rows with a prompt.")],
    policy: Annotated[list[str], typer.Option(help="host:port of a policy service; several for several models.")],
    n: Annotated[int, typer.Option(help="Answers a prompt and model.")] = 2,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    concurrency: Annotated[int, typer.Option(help="Prompts under way at once.")] = 16,
    tls: Annotated[Path | None, typer.Option(help="Folder with ca.crt, for mTLS also tls.crt and tls.key.")] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Generates candidates through the policy service and adds them to a project."""
    import asyncio

    from steersman.candidates import Sampling, choose
    from steersman.candidates import generate as candidates
    from steersman.config.tls import ClientTls
    from steersman.data.export import read_any
    from steersman.store import Store
    from steersman.store.judging import add_items, get_project, item_of_row
    from steersman.store.verdicts import MAX_CANDIDATES

    opened = Store.open(store)
    with opened.reading() as session:
        target = get_project(session, project)
    least, most = {"compare": (2, 2), "rank": (2, MAX_CANDIDATES)}.get(target.kind, (1, 1))
    sampling = Sampling(n, max_new_tokens, temperature, seed=seed, concurrency=concurrency)

    async def run() -> tuple[int, int]:
        added = short = 0
        secret = ClientTls.in_folder(tls) if tls is not None else None
        async for found in candidates(policy, read_any(prompts), sampling, secret):
            if len(found.candidates) < least:
                short += 1
                continue
            with opened.transaction() as session:
                added += add_items(session, target, [item_of_row(found.row, choose(found.candidates, most))])
        return added, short

    added, short = asyncio.run(run())
    typer.echo(f"{added:,} items added to {project}; {short:,} prompts got fewer than {least} different answers")


@app.command()
def reopen(
    project: str,
    limit: Annotated[int, typer.Option(help="At most so many, the most disputed first.")] = 1000,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Takes back the verdicts on disputed items and hands the items out again."""
    from steersman.store import Store
    from steersman.store.judging import get_project, reopen_disputed

    with Store.open(store).transaction() as session:
        count = reopen_disputed(session, get_project(session, project), limit)
    typer.echo(f"{count:,} disputed items of {project} are open again")


@app.command()
def agreement(
    project: str,
    json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Shows how far the labelers of a project agree, and what would block a release."""
    from steersman.cli.agreement_table import print_report
    from steersman.data.agreement import Thresholds
    from steersman.store import Store
    from steersman.store.judging import get_project
    from steersman.store.statistics import agreement_report

    with Store.open(store).reading() as session:
        found = get_project(session, project)
        report = agreement_report(session, found)
        failures = report.failures(Thresholds.model_validate(found.thresholds))
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        print_report(report, failures)


@app.command()
def release(
    name: Annotated[str, typer.Argument(help="Name of the data set.")],
    source: Annotated[list[str], typer.Option(help="project:NAME, feedback, or a file of canonical rows.")],
    out: Annotated[Path, typer.Option(help="Folder of all releases.")] = Path("releases"),
    option: Annotated[list[str], typer.Option("--set", help="As ties=keep, pii.entities=email,name.")] = [],  # noqa: B006
    splits: Annotated[str, typer.Option(help="Shares; a prompt lies on one side only.")] = "train=0.95,test=0.05",
    threshold: Annotated[list[str], typer.Option(help="As min_alpha=0.6, instead of the projects'.")] = [],  # noqa: B006
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
def releases(store: StoreOption = DEFAULT_STORE) -> None:
    """Lists the releases and checks their files."""
    import sqlalchemy as sa
    from rich.console import Console
    from rich.table import Table

    from steersman.errors import SteersmanError
    from steersman.store import Store
    from steersman.store.models import Release
    from steersman.store.releases import verify

    table = Table("release", "rows", "made", "state", "folder")
    with Store.open(store).reading() as session:
        for found in session.scalars(sa.select(Release).order_by(Release.name, Release.version)):
            try:
                verify(found)
                state = "good"
            except SteersmanError as error:
                state = error.message
            made = f"{found.created_at:%Y-%m-%d %H:%M}"
            table.add_row(f"{found.name} v{found.version}", f"{found.card['rows']:,}", made, state, found.url)
    Console().print(table)


@app.command()
def trained(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Records on which releases the models of a run were trained, by the hashes of its data files."""
    from steersman.store import Store
    from steersman.store.releases import record_run

    with Store.open(store).transaction() as session:
        found = [(stage, f"{release.name} v{release.version}") for stage, release in record_run(session, run)]
    for stage, release in found:
        typer.echo(f"{stage} of {run.resolve().name} was trained on {release}")
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
        typer.confirm(f"Delete all data of {whose} ({found})? This cannot be undone.", abort=True)
    report = register.delete_customer(opened, subject)
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


@app.command()
def import_judgements(
    project: str,
    files: Annotated[list[str], typer.Argument(help="JSON lines or CSV: item, labeler, value, time.")],
    column: Annotated[list[str], typer.Option(help="PART=COLUMN, where the file has other names.")] = [],  # noqa: B006
    value: Annotated[list[str], typer.Option(help="a=..., b=..., tie=...: what the file calls them.")] = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Takes over judgements that were given elsewhere, each with its labeler and time; equal votes are all kept."""
    from steersman.data.opening import expand
    from steersman.data.sources import read_records
    from steersman.errors import DataError
    from steersman.store import Store
    from steersman.store.interchange import import_judgements as take
    from steersman.store.judging import get_project

    broken: list[DataError] = []

    def records() -> Iterator[dict[str, Any]]:
        for file in expand(files):
            for record in read_records(file):
                if isinstance(record.data, DataError):
                    broken.append(record.data)
                else:
                    yield record.data

    with Store.open(store).transaction() as session:
        target = get_project(session, project)
        taken = take(session, target, records(), parse_pairs(column, "--column"), parse_pairs(value, "--value"))
    typer.echo(f"{taken.new:,} judgements added to {project}, {taken.there_already:,} were there already")
    for reason, count in taken.left_out.items():
        typer.echo(f"  left out: {count:,} x {reason}")
    for error in broken:
        typer.echo(f"  left out: {error.message}")
    if not taken.new and not taken.there_already:
        raise DataError(f"no judgement of {', '.join(files)} could be taken over")


@app.command()
def export_judgements(
    project: str,
    target: Annotated[Path, typer.Argument(help="File to write: .csv, or JSON lines.")],
    undone: Annotated[bool, typer.Option(help="Also those that were taken back, marked.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Writes every single judgement of a project: item, labeler, value, time."""
    from steersman.store import Store
    from steersman.store.interchange import export_judgements as rows
    from steersman.store.interchange import write_judgements
    from steersman.store.judging import get_project

    with Store.open(store).reading() as session:
        found = get_project(session, project)
        count = write_judgements(rows(session, found, undone=undone), target, found.aspects)
    typer.echo(f"{count:,} judgements written to {target}")


@app.command()
def edit_project(
    project: str,
    guidelines: Annotated[Path | None, typer.Option(help="Markdown file, shown beside the task.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Labelers for each item.")] = None,
    honeypot_every: Annotated[int | None, typer.Option(help="Every n-th task has a known answer; 0 never.")] = None,
    threshold: Annotated[list[str], typer.Option(help="As min_alpha=0.6; blocks releases.")] = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Changes a project's settings; earlier ones stay on record, and every judgement says under which it was given."""
    import getpass

    from steersman.store import Store
    from steersman.store.judging import get_project
    from steersman.store.managing import edit_project as edit

    changes: dict[str, object] = {"overlap": overlap, "honeypot_every": honeypot_every}
    changes["guidelines"] = guidelines.read_text() if guidelines else None
    changes["thresholds"] = read_thresholds(threshold) if threshold else None
    given = {name: value for name, value in changes.items() if value is not None}
    with Store.open(store).transaction() as session:
        version = edit(session, get_project(session, project), getpass.getuser(), **given)
    typer.echo(f"{project}: settings are version {version}")


@app.command()
def assign(
    project: str,
    labeler: Annotated[str, typer.Argument(help="Who gets the items.")],
    search: Annotated[str, typer.Option(help="Items with this in their key or conversation.")] = "",
    state: Annotated[str, typer.Option(help="open, judged, disputed, resolved or all.")] = "open",
    limit: Annotated[int, typer.Option(help="At most so many.")] = 100,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Gives items to one person, who gets them next and keeps them."""
    from steersman.errors import ConfigError
    from steersman.store import Store
    from steersman.store.judging import ensure_labeler, get_project
    from steersman.store.managing import STATES, find_items
    from steersman.store.managing import assign as give

    if state not in STATES:
        raise ConfigError(f"--state {state!r}: expected one of {', '.join(STATES)}")
    with Store.open(store).transaction() as session:
        target = get_project(session, project)
        items = find_items(session, target, text=search, state=state, limit=limit)
        given = give(session, target, ensure_labeler(session, labeler), [item.id for item in items])
    typer.echo(f"{given:,} items of {project} given to {labeler}")


@app.command()
def retire_labeler(
    labeler: str,
    forget: Annotated[bool, typer.Option(help="Take back all that they judged, and hand it out again.")] = False,
    customer: Annotated[str | None, typer.Option(help="Tenant, where several have a labeler of this name.")] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Ends a labeler's work; what is in their hands goes to others."""
    from steersman.store import Store
    from steersman.store.managing import get_labeler, retire

    with Store.open(store).transaction() as session:
        taken_back = retire(session, get_labeler(session, labeler, customer), forget=forget)
    typer.echo(f"{labeler} is retired; {taken_back:,} verdicts taken back")


@app.command()
def order(
    project: str,
    reward: Annotated[str, typer.Option(help="host:port of a reward service.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Hands out first what a reward model is least sure of; what it thinks is shown to nobody."""
    from steersman.ordering import order_by_reward
    from steersman.store import Store

    ordered, left = order_by_reward(Store.open(store), project, reward)
    typer.echo(f"{ordered:,} items of {project} ordered, {left:,} left as they are (an answer has no reward)")
