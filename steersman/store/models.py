"""Tables of the store.

What people decide is kept as they said it (`Judgement.verdict`, `FeedbackEvent`); statistics come from small tables of
counts that are changed in the same transaction (`UnitPattern`, `VotePair`, `LabelerDay`, `AgreementDay`), so that they
answer at once however many judgements there are. The gateway's own tables are in `steersman.store.serving`.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NullableJson = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Json = sa.JSON().with_variant(JSONB(), "postgresql")
BigKey = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


ProjectKind = Literal["compare", "rank", "rate", "edit"]
AssignmentState = Literal["open", "judged", "skipped"]
FeedbackKind = Literal["thumbs", "edit", "outcome"]
FeedbackChannel = Literal["browser", "application", "staff"]
ItemState = Literal["all", "open", "judged", "disputed", "resolved", "honeypots"]

# Which items a state holds, and how much they are disputed. Literally the same in indexes and queries: a database takes
# an index for a query only if it sees that it holds all that is asked for, which a parameter hides.
DISPUTED = "coalesce(disagreement, 0)"
ITEM_STATES: dict[ItemState, str] = {
    "open": "open_slots > 0 AND resolved_at IS NULL AND NOT honeypot",
    "judged": "judgements > 0 AND NOT honeypot",
    "disputed": "disagreement <> 0 AND resolved_at IS NULL AND NOT honeypot",
    "resolved": "resolved_at IS NOT NULL AND NOT honeypot",
    "honeypots": "honeypot",
}


class UtcDateTime(sa.types.TypeDecorator[dt.datetime]):
    """An aware point in time; SQLite keeps it as UTC without its zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        return value if value is None else value.astimezone(dt.UTC)

    def process_result_value(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        return value if value is None or value.tzinfo else value.replace(tzinfo=dt.UTC)


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Base(DeclarativeBase):
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dict[str, Any]: Json, list[Any]: Json, dt.datetime: UtcDateTime}


# --- judging ----------------------------------------------------------------------------------------------------


class Project(Base):
    """A labelling task: what is asked, of which items, how often."""

    __tablename__ = "projects"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(200), unique=True)
    kind: Mapped[ProjectKind] = mapped_column(sa.String(16))
    guidelines: Mapped[str] = mapped_column(sa.Text, default="")
    """Markdown, shown beside the task."""
    aspects: Mapped[list[Any]] = mapped_column(default=list)
    """rate: names of the aspects, each judged 1 to 5."""
    overlap: Mapped[int] = mapped_column(default=3)
    """How many labelers judge the same item."""
    honeypot_every: Mapped[int] = mapped_column(default=0)
    """Every n-th task of a labeler is one with a known answer; 0 never."""
    thresholds: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """What blocks a release; see `steersman.data.agreement.Thresholds`."""
    customer: Mapped[str] = mapped_column(sa.String(200), default="")
    """The tenant whose labelers and operators see it; empty: all, each with the items of its own tenant and of none."""
    version: Mapped[int] = mapped_column(default=1)
    """Counts up with every change of its settings; see `ProjectVersion`."""
    created_at: Mapped[dt.datetime] = mapped_column(default=now)


class ProjectVersion(Base):
    """The settings that a project had, and who made them so."""

    __tablename__ = "project_versions"

    project_id: Mapped[int] = mapped_column(sa.ForeignKey("projects.id"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    settings: Mapped[dict[str, Any]]
    """guidelines, overlap, honeypot_every, thresholds."""
    by: Mapped[str] = mapped_column(sa.String(200), default="")
    created_at: Mapped[dt.datetime] = mapped_column(default=now)


class Labeler(Base):
    """A person who judges."""

    __tablename__ = "labelers"
    __table_args__ = (sa.UniqueConstraint("customer", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(sa.String(200), default="")
    """Tenant whose key the labeler works with."""
    name: Mapped[str] = mapped_column(sa.String(200))
    active: Mapped[bool] = mapped_column(default=True)
    """False: retired; what was judged stays."""
    created_at: Mapped[dt.datetime] = mapped_column(default=now)


class Item(Base):
    """A prompt with one or more candidate answers to be judged."""

    __tablename__ = "items"
    __table_args__ = (
        sa.UniqueConstraint("project_id", "key"),
        sa.Index(None, "project_id", "honeypot", "open_slots", "place", "id"),
        sa.Index(None, "project_id", "disagreement"),
        sa.Index(None, "customer"),
        sa.Index("ix_items_all", "project_id", sa.text(f"{DISPUTED} DESC"), "id"),
        *(
            sa.Index(
                f"ix_items_{state}", "project_id", sa.text(f"{DISPUTED} DESC"), "id",
                sqlite_where=sa.text(which), postgresql_where=sa.text(which),
            )
            for state, which in ITEM_STATES.items()
        ),
    )  # fmt: skip

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    project_id: Mapped[int] = mapped_column(sa.ForeignKey("projects.id"))
    key: Mapped[str] = mapped_column(sa.String(200))
    """Chosen by whoever adds the item; adding it twice changes nothing."""
    prompt: Mapped[list[Any]]
    candidates: Mapped[list[Any]]
    """[{"messages": [...], "model": ...}]; verdicts name them by position."""
    meta: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """source, licence, facts ... as on a row."""
    customer: Mapped[str | None] = mapped_column(sa.String(200))
    consent: Mapped[bool | None]
    honeypot: Mapped[bool] = mapped_column(default=False)
    expected: Mapped[dict[str, Any] | None]
    """Honeypots: the verdict that is right."""
    open_slots: Mapped[int]
    """Labelers still wanted: the overlap, less judgements and open assignments."""
    judgements: Mapped[int] = mapped_column(default=0)
    disagreement: Mapped[float | None]
    """Share of disagreeing pairs of votes; None below two judgements."""
    place: Mapped[float] = mapped_column(sa.Float, default=0.0, server_default="0")
    """Lower ones are handed out first; see `steersman.store.order`."""
    resolution: Mapped[dict[str, Any] | None] = mapped_column(NullableJson)
    """Adjudicated: the verdict that holds, whatever the labelers said."""
    resolved_by: Mapped[str | None] = mapped_column(sa.String(200))
    resolved_at: Mapped[dt.datetime | None]


class Assignment(Base):
    """An item in a labeler's hands, and the order in which the answers are shown."""

    __tablename__ = "assignments"
    __table_args__ = (sa.Index(None, "labeler_id", "project_id", "state"), sa.Index(None, "state", "assigned_at"))

    item_id: Mapped[int] = mapped_column(BigKey, sa.ForeignKey("items.id", ondelete="CASCADE"), primary_key=True)
    labeler_id: Mapped[int] = mapped_column(sa.ForeignKey("labelers.id"), primary_key=True)
    project_id: Mapped[int] = mapped_column(sa.ForeignKey("projects.id"))
    shown: Mapped[list[Any]]
    """Candidate positions in the order shown."""
    state: Mapped[AssignmentState] = mapped_column(sa.String(8), default="open")
    held: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    """Given to this person by name: not taken back when time passes."""
    assigned_at: Mapped[dt.datetime] = mapped_column(default=now)


class Judgement(Base):
    """One labeler's verdict on one item; undone ones stay for the record."""

    __tablename__ = "judgements"
    __table_args__ = (
        sa.Index(
            "uq_judgements_current",
            "item_id",
            "labeler_id",
            unique=True,
            sqlite_where=sa.text("undone_at IS NULL"),
            postgresql_where=sa.text("undone_at IS NULL"),
        ),
        sa.Index(None, "labeler_id", "project_id", "id"),
        sa.Index(None, "item_id"),  # of the undone ones, too: an item's deletion asks for them
    )

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    event_id: Mapped[str] = mapped_column(sa.String(64), unique=True)
    """Chosen by the caller; the same verdict sent twice is stored once."""
    project_id: Mapped[int] = mapped_column(sa.ForeignKey("projects.id"))
    item_id: Mapped[int] = mapped_column(BigKey, sa.ForeignKey("items.id", ondelete="CASCADE"))
    labeler_id: Mapped[int] = mapped_column(sa.ForeignKey("labelers.id"))
    verdict: Mapped[dict[str, Any]]
    """See `steersman.store.verdicts.Verdict`."""
    shown: Mapped[list[Any]]
    seconds: Mapped[float]
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    undone_at: Mapped[dt.datetime | None]
    project_version: Mapped[int] = mapped_column(default=1, server_default="1")
    """The settings under which it was given."""
    undone_why: Mapped[str | None] = mapped_column(sa.String(16))
    """undone (by the labeler), replaced, reopened, retired or withdrawn."""


class UnitPattern(Base):
    """How many items got the same votes on their units (the item itself, or each pair of its answers): all that alpha,
    kappa and their intervals need."""

    __tablename__ = "unit_patterns"

    project_id: Mapped[int] = mapped_column(sa.ForeignKey("projects.id"), primary_key=True)
    question: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    pattern: Mapped[str] = mapped_column(sa.String(1000), primary_key=True)
    """Votes by value of each unit, as "0:2,2:1|1:3"; units of one item have no order."""
    n: Mapped[int] = mapped_column(sa.BigInteger)


class VotePair(Base):
    """Confusion counts of two labelers on one question; labeler_a < labeler_b."""

    __tablename__ = "vote_pairs"

    project_id: Mapped[int] = mapped_column(sa.ForeignKey("projects.id"), primary_key=True)
    question: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    labeler_a: Mapped[int] = mapped_column(sa.ForeignKey("labelers.id"), primary_key=True)
    labeler_b: Mapped[int] = mapped_column(sa.ForeignKey("labelers.id"), primary_key=True)
    value_a: Mapped[int] = mapped_column(primary_key=True)
    value_b: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(sa.BigInteger)


class AgreementDay(Base):
    """Pairs of votes that a day's judgements completed, and how many of them agree."""

    __tablename__ = "agreement_days"

    project_id: Mapped[int] = mapped_column(sa.ForeignKey("projects.id"), primary_key=True)
    question: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    day: Mapped[dt.date] = mapped_column(primary_key=True)
    pairs: Mapped[int] = mapped_column(sa.BigInteger)
    agreeing: Mapped[int] = mapped_column(sa.BigInteger)


class LabelerDay(Base):
    """A labeler's day in one project."""

    __tablename__ = "labeler_days"

    project_id: Mapped[int] = mapped_column(sa.ForeignKey("projects.id"), primary_key=True)
    labeler_id: Mapped[int] = mapped_column(sa.ForeignKey("labelers.id"), primary_key=True)
    day: Mapped[dt.date] = mapped_column(primary_key=True)
    judgements: Mapped[int] = mapped_column(sa.BigInteger)
    skipped: Mapped[int] = mapped_column(sa.BigInteger)
    unsafe: Mapped[int] = mapped_column(sa.BigInteger)
    milliseconds: Mapped[int] = mapped_column(sa.BigInteger)
    decided: Mapped[int] = mapped_column(sa.BigInteger)
    """Comparisons of two answers that were not ties."""
    decided_first: Mapped[int] = mapped_column(sa.BigInteger)
    """Of these: how often the answer shown first won."""
    honeypots: Mapped[int] = mapped_column(sa.BigInteger)
    honeypots_right: Mapped[int] = mapped_column(sa.BigInteger)


# --- live feedback ----------------------------------------------------------------------------------------------


class Answer(Base):
    """An answer that the bot gave to a business application.

    What was said (`prompt`, `answer`) is kept apart from what was looked up for it (`lookups`).
    """

    __tablename__ = "answers"
    __table_args__ = (
        sa.Index(None, "customer", "end_customer"),
        sa.Index(None, "conversation_id"),
        sa.Index(None, "deployment", "created_at"),
        sa.Index(None, "created_at"),
    )

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    conversation_id: Mapped[str | None] = mapped_column(sa.String(64))
    customer: Mapped[str] = mapped_column(sa.String(200), default="")
    """The tenant who asked; feedback is taken from the same tenant only."""
    end_customer: Mapped[str] = mapped_column(sa.String(64), default="")
    """Pseudonym of the person on whose behalf the tenant asked (`steersman.store.secret.pseudonym`); empty: unknown."""
    deployment: Mapped[str] = mapped_column(sa.String(200), default="")
    """champion, candidate ...: the variant that answered, what a gate compares."""
    model: Mapped[str] = mapped_column(sa.String(200), default="")
    adapter: Mapped[str] = mapped_column(sa.String(200), default="")
    """Model or adapter that the replica says it serves."""
    weights_version: Mapped[str] = mapped_column(sa.String(64), default="")
    prompt: Mapped[list[Any]]
    answer: Mapped[str] = mapped_column(sa.Text)
    lookups: Mapped[list[Any]] = mapped_column(default=list)
    """Reads of business systems and tool calls, by reference: [{"tool", "arguments", "outcome", "records"}]; with
    "text_read" only where the gateway was told to keep it."""
    tool_calls: Mapped[list[Any]] = mapped_column(default=list)
    """Calls that were left to the caller: [{"id", "name", "arguments"}]."""
    sampling: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Sampling parameters as used, by the contract's field names."""
    token_ids: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    """Little-endian int32 [R]; None: the engine does not tell, or the time to keep them is over."""
    logprobs: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    """Little-endian float32 [R], natural logarithm, aligned with `token_ids`."""
    consent: Mapped[bool | None]
    """Whether the person agreed to training on it; None, nobody said so, counts as no."""
    created_at: Mapped[dt.datetime] = mapped_column(default=now)


class FeedbackEvent(Base):
    """What a person or a business system said about an answer.

    All of it stays for the record; `current` marks what counts: the latest of each judge and answer.
    """

    __tablename__ = "feedback_events"
    __table_args__ = (
        sa.UniqueConstraint("customer", "event_id"),
        sa.Index(None, "answer_id"),
        sa.Index(None, "received_at"),
    )

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    customer: Mapped[str] = mapped_column(sa.String(200))
    event_id: Mapped[str] = mapped_column(sa.String(128))
    answer_id: Mapped[str] = mapped_column(sa.ForeignKey("answers.id", ondelete="CASCADE"))
    kind: Mapped[FeedbackKind] = mapped_column(sa.String(16))
    value: Mapped[str] = mapped_column(sa.Text)
    """up or down; the edited answer; the outcome's name."""
    reason: Mapped[str] = mapped_column(sa.Text, default="")
    channel: Mapped[FeedbackChannel] = mapped_column(sa.String(16), default="application")
    """browser: whoever held the answer's token; application: with an API key; staff: a person who logged in."""
    judge: Mapped[str] = mapped_column(sa.String(200), default="")
    """Who judged, as far as that is known; one judge has one current verdict on an answer."""
    origin: Mapped[str] = mapped_column(sa.String(64), default="")
    """Pseudonym of the network address it came from."""
    current: Mapped[bool] = mapped_column(default=True)
    """False: the same judge has said something else since."""
    received_at: Mapped[dt.datetime] = mapped_column(default=now)


# --- releases ---------------------------------------------------------------------------------------------------


class Release(Base):
    """A version of a data set. Its files and its digest never change."""

    __tablename__ = "releases"
    __table_args__ = (sa.UniqueConstraint("name", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(200))
    version: Mapped[int]
    url: Mapped[str] = mapped_column(sa.Text)
    """Folder of the files."""
    digest: Mapped[str] = mapped_column(sa.String(64))
    """SHA-256 over the files' names and digests."""
    card: Mapped[dict[str, Any]]
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    withdrawn_at: Mapped[dt.datetime | None]
    withdrawn_reason: Mapped[str | None] = mapped_column(sa.Text)


class ReleaseCustomer(Base):
    """How many rows of a tenant a release holds."""

    __tablename__ = "release_customers"
    __table_args__ = (sa.Index(None, "customer"),)

    release_id: Mapped[int] = mapped_column(sa.ForeignKey("releases.id"), primary_key=True)
    customer: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    rows: Mapped[int]


class ReleaseEndCustomer(Base):
    """How many rows of an end customer a release holds."""

    __tablename__ = "release_end_customers"
    __table_args__ = (sa.Index(None, "end_customer"),)

    release_id: Mapped[int] = mapped_column(sa.ForeignKey("releases.id"), primary_key=True)
    end_customer: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    """Pseudonym, as on an answer."""
    rows: Mapped[int]


class Training(Base):
    """A model that was trained on a release."""

    __tablename__ = "trainings"

    release_id: Mapped[int] = mapped_column(sa.ForeignKey("releases.id"), primary_key=True)
    run: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    model: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    created_at: Mapped[dt.datetime] = mapped_column(default=now)


class Deletion(Base):
    """That the data of a tenant, or of one of its end customers, was deleted, when, and what followed."""

    __tablename__ = "deletions"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(sa.String(200))
    end_customer: Mapped[str] = mapped_column(sa.String(64), default="")
    """Pseudonym; empty: the whole tenant."""
    report: Mapped[dict[str, Any]]
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    lifted_at: Mapped[dt.datetime | None]
    """When the block on new data of this tenant was lifted again."""
