"""`steersman data`, the labelling half: projects, items, people, judgements, agreement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from steersman.cli.options import DEFAULT_STORE, JsonOption, StoreOption, parse_pairs

app = typer.Typer()


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
def projects(as_json: JsonOption = False, store: StoreOption = DEFAULT_STORE) -> None:
    """Lists the labelling projects."""
    import sqlalchemy as sa
    from rich.console import Console
    from rich.table import Table

    from steersman.cli.shapes import ProjectLine, print_json
    from steersman.store import Store
    from steersman.store.models import Item, LabelerDay, Project

    items = sa.select(sa.func.count()).where(Item.project_id == Project.id).scalar_subquery()
    judged = (
        sa.select(sa.func.coalesce(sa.func.sum(LabelerDay.judgements), 0))
        .where(LabelerDay.project_id == Project.id)
        .scalar_subquery()
    )
    with Store.open(store).reading() as session:
        found = [
            ProjectLine(project.name, project.kind, project.overlap, item_count, int(judgements))
            for project, item_count, judgements in session.execute(
                sa.select(Project, items, judged).order_by(Project.name)
            )
        ]
    if as_json:
        print_json(found)
        return
    table = Table("project", "kind", "overlap", "items", "judgements")
    for one in found:
        table.add_row(one.name, one.kind, str(one.overlap), f"{one.items:,}", f"{one.judgements:,}")
    Console().print(table)


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
def compare_run(
    run: Annotated[Path, typer.Argument(help="Folder of a run with an evaluation.")],
    project: Annotated[str, typer.Option(help="Made where it does not exist; the run's name by default.")] = "",
    model: Annotated[list[str], typer.Option(help="Models to compare; all by default; repeatable.")] = [],  # noqa: B006
    prompts: Annotated[int | None, typer.Option(help="Only the first prompts.", min=1)] = None,
    overlap: Annotated[int, typer.Option(help="Labelers for each pair, in a new project.", min=1)] = 3,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Puts a run's answers before people, blind: which of two models' answers is better?"""
    from steersman.errors import NotFoundError
    from steersman.report.schema import read_evaluation_of
    from steersman.store import Store, judging
    from steersman.store.blind import items_of
    from steersman.store.judging import add as add_to

    evaluation = read_evaluation_of(run)
    name = project or evaluation.name
    with Store.open(store).transaction() as session:
        try:
            target = judging.get_project(session, name)
        except NotFoundError:
            target = judging.create_project(session, name, "compare", overlap=overlap)
        added = add_to(session, target, items_of(evaluation, model or list(evaluation.models), prompts))
    said = added.describe()
    typer.echo(f"{added.new:,} pairs added to {name}{f'; {said}' if said else ''}; steersman data wins {name} counts")


@app.command()
def wins(
    project: str,
    as_json: JsonOption = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Which model people prefer in a blind comparison: win rates and Bradley and Terry's strengths, with intervals."""
    import json

    from rich.console import Console
    from rich.table import Table

    from steersman.errors import NotFoundError
    from steersman.report.wins import matrix
    from steersman.store import Store
    from steersman.store.blind import duels_of
    from steersman.store.judging import get_project

    with Store.open(store).reading() as session:
        duels = duels_of(session, get_project(session, project))
    if not duels:
        raise NotFoundError(f"{project}: no comparison of models has been judged yet")
    names = list(dict.fromkeys(name for duel in duels for name in (duel.one, duel.other)))
    rows = matrix(duels, names)
    if as_json:
        cells = {
            row.name: {
                other: [round(x, 4) for x in cell.rate] for other, cell in zip(names, row.cells, strict=True) if cell
            }
            for row in rows
        }
        strengths = {row.name: [round(x, 4) for x in row.strength] if row.strength else None for row in rows}
        typer.echo(json.dumps({"judgements": len(duels), "win_rates": cells, "strengths": strengths}))
        return
    table = Table(f"{len(duels)} judgements: wins of", *(f"against {name}" for name in names), "strength")
    for row in rows:
        shares = [
            "" if cell is None else f"{cell.rate.estimate:.1%} ({cell.rate.low:.1%} to {cell.rate.high:.1%})"
            for cell in row.cells
        ]
        strength = "" if row.strength is None else f"{row.strength.estimate:+.2f}"
        table.add_row(row.name, *shares, strength)
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
def assign(
    project: str,
    labeler: Annotated[str, typer.Argument(help="Who gets the items.")],
    search: Annotated[str, typer.Option(help="Items with this in their key or conversation.")] = "",
    end_customer: Annotated[str, typer.Option(help="Only items of this end customer, by pseudonym.")] = "",
    state: Annotated[str, typer.Option(help="open, judged, disputed, resolved or all.")] = "open",
    limit: Annotated[int, typer.Option(help="At most so many.")] = 100,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Gives items to one person, who gets them next and keeps them."""
    from steersman.errors import ConfigError, meant
    from steersman.store import Store
    from steersman.store.judging import ensure_labeler, get_project
    from steersman.store.managing import STATES, find_items
    from steersman.store.managing import assign as give

    if state not in STATES:
        raise ConfigError(f"--state {state!r}: expected one of {', '.join(STATES)}{meant(state, STATES)}")
    with Store.open(store).transaction() as session:
        target = get_project(session, project)
        items = find_items(session, target, text=search, end_customer=end_customer, state=state, limit=limit)
        given = give(session, target, ensure_labeler(session, labeler), [item.id for item in items])
    typer.echo(f"{given:,} items of {project} given to {labeler}")


@app.command()
def order(
    project: str,
    reward: Annotated[str, typer.Option(help="host:port of a reward service.")],
    accuracy: Annotated[
        float, typer.Option(help="Licence: least lower end of how often it prefers what people did.", min=0, max=1)
    ] = 0.5,
    without: Annotated[str, typer.Option(help="What happens without the licence: warn, or refuse.")] = "warn",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Hands out first what a reward model is least sure of; what it thinks is shown to nobody."""
    from steersman.errors import ConfigError
    from steersman.judges.options import Licence
    from steersman.ordering import order_by_reward
    from steersman.store import Store

    if without not in ("warn", "refuse"):
        raise ConfigError(f"--without {without!r}: expected warn or refuse")
    licence = Licence.model_validate({"accuracy": accuracy, "without": without})
    done = order_by_reward(Store.open(store), project, reward, licence, lambda line: typer.echo(line, err=True))
    typer.echo(f"{done.ordered:,} items of {project} ordered, {done.left:,} left as they are (an answer has no reward)")
    if done.licence.granted:
        typer.echo(f"{reward} has a licence: {done.licence.text}")


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
    as_json: JsonOption = False,
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
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        print_report(report, failures)


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
