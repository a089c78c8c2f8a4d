"""The register of releases: publishing, verifying, what was trained on them, deleting somebody's data.

A version's files and card never change. Deleting the data of a tenant, or of one of its end customers, makes a new
version without it of every data set that holds some, erases the files of the versions that do (their card stays, marked
withdrawn), and names the models that were trained on them.
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from steersman.artifacts import atomic_dir, file_digest
from steersman.config.stages import read_complete
from steersman.data.release import Draft, write_without
from steersman.data.rules import ReleaseOptions
from steersman.errors import ChecksumError, ConflictError, NotFoundError
from steersman.store.drafts import write_release
from steersman.store.engine import Store
from steersman.store.judging import withdraw_items
from steersman.store.models import Answer, Deletion, Item, Release, ReleaseCustomer, ReleaseEndCustomer, Training, now
from steersman.store.serving import forget

_TENANT_DELETED = "a tenant's data was deleted"


@dataclass(frozen=True)
class Subject:
    """Whose data is deleted: a tenant's, or that of one of its end customers."""

    tenant: str
    pseudonym: str = ""
    """Of the end customer, as on his answers; empty: the whole tenant."""
    key: str | None = None
    """Of the end customer in the tenant's business systems: what the gateway remembers him by."""

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a row of a data set is his."""
        if row.get("customer") != self.tenant:
            return False
        return not self.pseudonym or row.get("end_customer") == self.pseudonym


@dataclass(frozen=True)
class DeletionReport:
    """What deleting somebody's data did."""

    customer: str
    end_customer: str
    """Pseudonym; empty: the whole tenant."""
    remembered: int
    """Conversations, proposed actions and kept results of the gateway."""
    items: int
    answers: int
    new_versions: dict[str, int | None]
    """Data set -> the version without the tenant; None where no row was left."""
    withdrawn: list[str]
    """NAME vN that held the tenant's rows; their files are erased."""
    models: list[dict[str, str]]
    """Models trained on them: release, run, model."""
    files: list[str]
    """Imported files that fed those versions: the tenant's rows must be removed there by their owner."""


def publish(store: Store, options: ReleaseOptions, root: Path) -> tuple[Release, bool]:
    """Makes the next version of a data set under `root`/NAME/vN; (release, False) when nothing changed since the last.

    Raises FailedPreconditionError when agreement misses a threshold; see `write_release`.
    """
    with store.reading() as session:
        staged = _staging_folder(root.absolute() / options.name)
        with atomic_dir(staged) as partial:
            draft = write_release(session, options, partial)
    try:
        with store.transaction() as session:
            last = latest(session, options.name)
            if last is not None and last.digest == draft.digest:
                return last, False
            return _admit(session, options.name, staged, draft), True
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def latest(session: Session, name: str) -> Release | None:
    """The newest version that is not withdrawn."""
    return session.scalar(
        sa.select(Release)
        .where(Release.name == name, Release.withdrawn_at.is_(None))
        .order_by(Release.version.desc())
        .limit(1)
    )


def get_release(session: Session, name: str, version: int | None = None) -> Release:
    """A version of a data set, the newest by default. Raises NotFoundError."""
    if version is None:
        release = latest(session, name)
    else:
        release = session.scalar(sa.select(Release).where(Release.name == name, Release.version == version))
    if release is None:
        asked = name if version is None else f"{name} v{version}"
        raise NotFoundError(f"release {asked} does not exist; `steersman data releases` lists them")
    return release


def verify(release: Release) -> None:
    """Raises ChecksumError when a file of the release is not what its card says, NotFoundError when withdrawn."""
    if release.withdrawn_at is not None:
        raise NotFoundError(f"release {release.name} v{release.version} was withdrawn: {release.withdrawn_reason}")
    for name, digest in release.card["files"].items():
        path = Path(release.url) / name
        if not path.is_file() or file_digest(path) != digest:
            raise ChecksumError(f"{path}: missing or changed since the release; restore it from a backup")


def record_training(session: Session, release: Release, run: str, model: str) -> None:
    """Remembers that a model was trained on a release; repeating it changes nothing."""
    if session.get(Training, (release.id, run, model)) is None:
        session.add(Training(release_id=release.id, run=run, model=model))
        session.flush()


def record_run(session: Session, run_dir: Path) -> list[tuple[str, Release]]:
    """Remembers on which releases the models of a run were trained, by the hashes of the data files that it used.

    Args:
        run_dir: folder of the run, here or copied from elsewhere; its data files need not exist any more.

    Returns:
        Stage and release, in the order of their names.

    Raises:
        NotFoundError: no complete stage in the folder made a model.
    """
    stages = [path.parent.name for path in sorted(run_dir.glob("*/complete.json")) if path.with_name("model").is_dir()]
    if not stages:
        raise NotFoundError(f"{run_dir} holds no complete stage with a model; name the folder of a run")
    releases = session.scalars(sa.select(Release).order_by(Release.name, Release.version)).all()
    found: list[tuple[str, Release]] = []
    for stage in stages:
        data = (read_complete(run_dir, stage) or {}).get("data", {})
        used = {digest for split, digest in data.items() if not split.endswith(".heldout")}
        found.extend((stage, release) for release in releases if used & set(release.card["files"].values()))
    for stage, release in found:
        record_training(session, release, run_dir.resolve().name, stage)
    return found


@dataclass(frozen=True)
class Holdings:
    """What is stored of somebody."""

    items: int
    answers: int
    rows: int
    """In releases that are not withdrawn."""

    def __bool__(self) -> bool:
        return bool(self.items or self.answers or self.rows)


def holdings(session: Session, subject: Subject) -> Holdings:
    """Counts what would be deleted."""
    items = sa.select(sa.func.count(Item.id)).where(Item.customer == subject.tenant)
    answers = sa.select(sa.func.count(Answer.id)).where(Answer.customer == subject.tenant)
    if subject.pseudonym:
        items = items.where(Item.meta["end_customer"].as_string() == subject.pseudonym)
        answers = answers.where(Answer.end_customer == subject.pseudonym)
    rows = sum(_rows_of(session, release.id, subject) for release in _holding(session, subject))
    return Holdings(session.scalar(items) or 0, session.scalar(answers) or 0, rows)


def known_customers(session: Session) -> list[str]:
    """Tenants of whom anything is stored."""
    columns = (Item.customer, Answer.customer, ReleaseCustomer.customer)
    return sorted({name for column in columns for name in session.scalars(sa.select(column).distinct()) if name})


def _check_known(session: Session, subject: Subject) -> None:
    """A name that nothing is stored under is a slip, unless its deletion was begun before."""
    begun = sa.select(Deletion.id).where(
        Deletion.customer == subject.tenant,
        Deletion.end_customer == subject.pseudonym,
        Deletion.lifted_at.is_(None),
    )
    if holdings(session, subject) or session.scalar(begun.limit(1)) is not None or subject.pseudonym:
        return
    known = ", ".join(map(repr, known_customers(session)[:20])) or "none"
    raise NotFoundError(f"tenant {subject.tenant!r}: nothing is stored of it; check the name, known are {known}")


def allow_customer(session: Session, tenant: str) -> int:
    """Takes new data of a deleted tenant again; what was deleted stays so. Returns how many blocks were lifted.

    Raises NotFoundError when the tenant is not blocked.
    """
    blocks = session.scalars(
        sa.select(Deletion).where(
            Deletion.customer == tenant, Deletion.end_customer == "", Deletion.lifted_at.is_(None)
        )
    ).all()
    if not blocks:
        raise NotFoundError(f"tenant {tenant!r} is not blocked; only a deleted tenant is")
    for block in blocks:
        block.lifted_at = now()
    session.flush()
    return len(blocks)


def delete_customer(store: Store, subject: Subject | str) -> DeletionReport:
    """Deletes a tenant's or an end customer's data everywhere. Safe to repeat after a crash: it goes on where it
    stopped. Raises NotFoundError for a tenant of whom nothing is stored."""
    if isinstance(subject, str):
        subject = Subject(subject)
    with store.reading() as session:
        _check_known(session, subject)
        staged = {name: _stage_without(session, name, subject) for name in _names(_holding(session, subject))}
    with store.transaction() as session:
        held = _holding(session, subject)
        if set(_names(held)) - set(staged):
            raise ConflictError(f"a release with rows of {subject.tenant!r} was made meanwhile; delete again")
        new_versions = {name: _replace(session, subject, *staged[name]) for name in _names(held)}
        models = [
            {"release": f"{release.name} v{release.version}", "run": row.run, "model": row.model}
            for release in held
            for row in session.scalars(
                sa.select(Training).where(Training.release_id == release.id).order_by(Training.run, Training.model)
            )
        ]
        for release in held:
            release.withdrawn_at = now()
            release.withdrawn_reason = "somebody's data was deleted" if subject.pseudonym else _TENANT_DELETED
        items = withdraw_items(session, subject.tenant, subject.pseudonym)
        mine = [Answer.customer == subject.tenant]
        if subject.pseudonym:
            mine.append(Answer.end_customer == subject.pseudonym)
        answers = session.execute(sa.delete(Answer).where(*mine)).rowcount  # type: ignore[attr-defined]
        remembered = 0
        if not subject.pseudonym or subject.key is not None:
            remembered = forget(session, subject.tenant, subject.key)
        sources = {source for release in held for source in release.card.get("sources", {})}
        report = DeletionReport(
            customer=subject.tenant,
            end_customer=subject.pseudonym,
            remembered=remembered,
            items=items,
            answers=answers,
            new_versions=new_versions,
            withdrawn=[f"{release.name} v{release.version}" for release in held],
            models=models,
            files=sorted(source for source in sources if source != "feedback" and not source.startswith("project:")),
        )
        session.add(Deletion(customer=subject.tenant, end_customer=subject.pseudonym, report=asdict(report)))
    # After the commit: a version is never without files while the register still offers it.
    for folder in _withdrawn_folders(store, subject):
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _rows_of(session: Session, release_id: int, subject: Subject) -> int:
    """Rows that a release holds of somebody."""
    held: ReleaseCustomer | ReleaseEndCustomer | None
    if subject.pseudonym:
        held = session.get(ReleaseEndCustomer, (release_id, subject.pseudonym))
    else:
        held = session.get(ReleaseCustomer, (release_id, subject.tenant))
    return held.rows if held is not None else 0


def _of(subject: Subject) -> sa.ColumnElement[bool]:
    """Releases that hold, or held, rows of somebody."""
    if subject.pseudonym:
        held = sa.select(ReleaseEndCustomer.release_id).where(ReleaseEndCustomer.end_customer == subject.pseudonym)
    else:
        held = sa.select(ReleaseCustomer.release_id).where(ReleaseCustomer.customer == subject.tenant)
    return Release.id.in_(held)


def _holding(session: Session, subject: Subject) -> list[Release]:
    """The versions that hold rows of somebody."""
    found = sa.select(Release).where(_of(subject), Release.withdrawn_at.is_(None))
    return list(session.scalars(found.order_by(Release.name, Release.version)))


def _names(releases: list[Release]) -> list[str]:
    return sorted({release.name for release in releases})


def _withdrawn_folders(store: Store, subject: Subject) -> list[Path]:
    with store.reading() as session:
        return [
            Path(url)
            for url in session.scalars(sa.select(Release.url).where(_of(subject), Release.withdrawn_at.is_not(None)))
        ]


def _stage_without(session: Session, name: str, subject: Subject) -> tuple[Release, Path | None, Draft | None]:
    """The newest version of a data set, and its files without somebody's rows; None where nothing need be made."""
    last = latest(session, name)
    assert last is not None  # the caller found a version that holds some
    if _rows_of(session, last.id, subject) in (0, last.card["rows"]):
        return last, None, None
    staged = _staging_folder(Path(last.url).parent)
    with atomic_dir(staged) as partial:
        card: dict[str, Any] = last.card | {"replaces": last.version}
        draft = write_without(Path(last.url), partial, card, lambda row: not subject.holds(row))
    return last, staged, draft


def _replace(session: Session, subject: Subject, last: Release, staged: Path | None, draft: Draft | None) -> int | None:
    """Registers a staged version; returns the version to use from now on, None where no row was left."""
    newest = latest(session, last.name)
    if newest is None or newest.id != last.id:
        raise ConflictError(f"data set {last.name}: another version was made meanwhile; delete again")
    if staged is not None and draft is not None:
        return _admit(session, last.name, staged, draft).version
    return None if _rows_of(session, last.id, subject) else last.version


def _staging_folder(parent: Path) -> Path:
    return parent / f".staged-{secrets.token_hex(4)}"


def _admit(session: Session, name: str, staged: Path, draft: Draft) -> Release:
    """Gives staged files the next version number, write-protects and registers them."""
    if session.get_bind().dialect.name == "postgresql":
        # Two publishers of one data set come one after the other; on SQLite all writers do.
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(name))))
    version = (session.scalar(sa.select(sa.func.max(Release.version)).where(Release.name == name)) or 0) + 1
    folder = staged.parent / f"v{version}"
    shutil.rmtree(folder, ignore_errors=True)  # of a publisher that was killed before it registered
    for path in staged.iterdir():
        path.chmod(0o444)
    staged.rename(folder)
    release = Release(name=name, version=version, url=str(folder), digest=draft.digest, card=draft.card)
    session.add(release)
    session.flush()
    session.add_all(
        ReleaseCustomer(release_id=release.id, customer=customer, rows=rows)
        for customer, rows in draft.customers.items()
    )
    session.add_all(
        ReleaseEndCustomer(release_id=release.id, end_customer=name, rows=rows)
        for name, rows in draft.end_customers.items()
    )
    session.flush()
    return release
