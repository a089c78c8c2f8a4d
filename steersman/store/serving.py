"""The gateway's tables: keys, use of quotas, audit trail, conversations, idempotency keys, proposed actions, tickets.

They lie here, beside what training reads, so that one migration path and one deletion cover the whole database.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, Session, mapped_column

from steersman.store.models import Base, BigKey, now


class Secret(Base):
    """Keys with which the gateway signs for itself, where it was given none: shared by all replicas on one
    PostgreSQL. See `steersman.store.secret`."""

    __tablename__ = "gateway_secrets"

    name: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    value: Mapped[str] = mapped_column(sa.String(64))


class ApiKey(Base):
    __tablename__ = "gateway_api_keys"

    id: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    """Public part of the key; it may stand in logs."""
    digest: Mapped[str] = mapped_column(sa.String(64))
    """SHA-256 of the secret part: 256 random bits need no slow hash."""
    tenant: Mapped[str] = mapped_column(sa.String(200))
    scopes: Mapped[list[Any]]
    note: Mapped[str] = mapped_column(sa.Text, default="")
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    tokens_per_day: Mapped[int | None] = mapped_column(sa.BigInteger)
    tokens_per_month: Mapped[int | None] = mapped_column(sa.BigInteger)
    concurrent: Mapped[int | None]
    """Answers at once."""
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    expires_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]


class KeyUse(Base):
    """What a key used on a day."""

    __tablename__ = "gateway_key_use"

    key_id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    day: Mapped[dt.date] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(sa.BigInteger)
    tokens: Mapped[int] = mapped_column(sa.BigInteger)


class KeyWindow(Base):
    """What a key used in its running minute, counted over all gateways."""

    __tablename__ = "gateway_key_windows"

    key_id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    began_at: Mapped[dt.datetime]
    requests: Mapped[int] = mapped_column(sa.BigInteger)
    tokens: Mapped[int] = mapped_column(sa.BigInteger)


class Reservation(Base):
    """Tokens set aside for an answer that is being given; gone when it is settled, or when its gateway died."""

    __tablename__ = "gateway_reservations"
    __table_args__ = (sa.Index("ix_gateway_reservations_key", "key_id"),)

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    key_id: Mapped[str] = mapped_column(sa.String(64))
    tokens: Mapped[int] = mapped_column(sa.BigInteger)
    expires_at: Mapped[dt.datetime]


class Audit(Base):
    """One line of the audit trail. It holds references, no texts."""

    __tablename__ = "gateway_audit"
    __table_args__ = (
        sa.Index("ix_gateway_audit_at", "at"),
        sa.Index("ix_gateway_audit_answer", "answer_id"),
        sa.Index("ix_gateway_audit_customer", "customer", "tenant"),
    )

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    at: Mapped[dt.datetime] = mapped_column(default=now)
    request_id: Mapped[str] = mapped_column(sa.String(128))
    action: Mapped[str] = mapped_column(sa.String(32))
    """answer, embed, replay, feedback, act, handover, inbox, keys, forget, refused."""
    outcome: Mapped[str] = mapped_column(sa.String(32))
    """Finish reason, or the error's class."""
    tenant: Mapped[str] = mapped_column(sa.String(200))
    key_id: Mapped[str] = mapped_column(sa.String(64))
    customer: Mapped[str] = mapped_column(sa.String(200))
    """The end customer."""
    origin: Mapped[str] = mapped_column(sa.String(64), default="")
    """Pseudonym of the network address, where a request was refused."""
    answer_id: Mapped[str] = mapped_column(sa.String(64), default="")
    records: Mapped[list[Any]] = mapped_column(default=list)
    """Business records that were read or written."""
    weights_version: Mapped[str] = mapped_column(sa.String(64), default="")
    prompt_tokens: Mapped[int] = mapped_column(default=0)
    completion_tokens: Mapped[int] = mapped_column(default=0)
    milliseconds: Mapped[int] = mapped_column(default=0)
    first_token_milliseconds: Mapped[int] = mapped_column(default=0)


class Conversation(Base):
    """Remembered turns; they belong to one tenant and customer."""

    __tablename__ = "gateway_conversations"
    __table_args__ = (sa.Index("ix_gateway_conversations_expires_at", "expires_at"),)

    tenant: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    customer: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    """As the caller calls it; of an answer that is kept by itself, its id."""
    turns: Mapped[list[Any]]
    kept: Mapped[dict[str, Any] | None] = mapped_column(
        sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
    )
    """What else is kept of such an answer."""
    expires_at: Mapped[dt.datetime]


class Idempotency(Base):
    """A request that must not be carried out twice, and its result."""

    __tablename__ = "gateway_idempotency"
    __table_args__ = (sa.Index("ix_gateway_idempotency_expires_at", "expires_at"),)

    scope: Mapped[str] = mapped_column(sa.String(400), primary_key=True)
    """SHA-256 of tenant, customer and route."""
    key: Mapped[str] = mapped_column(sa.String(255), primary_key=True)
    request_digest: Mapped[str] = mapped_column(sa.String(64))
    result: Mapped[dict[str, Any] | None] = mapped_column(
        sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
    )
    """None while the first request runs."""
    owner: Mapped[str] = mapped_column(sa.String(32), default="")
    """Drawn by the request that runs: what another one took over it cannot end any more."""
    tenant: Mapped[str] = mapped_column(sa.String(200), default="")
    customer: Mapped[str] = mapped_column(sa.String(200), default="")
    expires_at: Mapped[dt.datetime]


class ProposedAction(Base):
    """A write that the bot proposed to a customer."""

    __tablename__ = "gateway_proposed_actions"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(sa.String(200))
    customer: Mapped[str] = mapped_column(sa.String(200))
    action: Mapped[str] = mapped_column(sa.String(32))
    arguments: Mapped[dict[str, Any]]
    transcript: Mapped[list[Any]]
    state: Mapped[str] = mapped_column(sa.String(16))
    """proposed, running or done."""
    ticket: Mapped[str] = mapped_column(sa.String(200))
    expires_at: Mapped[dt.datetime]


class InboxTicket(Base):
    """A ticket of another system in which a customer wrote. It holds references, no texts."""

    __tablename__ = "gateway_inbox"
    __table_args__ = (sa.Index("ix_gateway_inbox_due_at", "due_at"),)

    inbox: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    """Name of the ticket system in the gateway's configuration."""
    ticket: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    tenant: Mapped[str] = mapped_column(sa.String(200))
    customer: Mapped[str] = mapped_column(sa.String(200), default="")
    """Key of the customer in the business systems, as the ticket system says it."""
    told: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    """How often the system said that there is something new."""
    due_at: Mapped[dt.datetime | None]
    """When somebody is to look at it; None: nothing is to be done."""
    held_until: Mapped[dt.datetime | None]
    """Somebody is looking at it, for so long at most: he may die."""
    attempts: Mapped[int] = mapped_column(default=0)
    """Looks that failed since the last one that did not."""
    answered: Mapped[str] = mapped_column(sa.String(64), default="")
    """The system's number of the last message that was answered."""
    replies: Mapped[int] = mapped_column(default=0)
    """Answers that were written into the ticket."""
    outcome: Mapped[str] = mapped_column(sa.String(32), default="")
    """How the last look ended."""
    changed_at: Mapped[dt.datetime] = mapped_column(default=now)


def forget(session: Session, tenant: str, customer: str | None = None) -> int:
    """Deletes what the gateway remembers of a tenant, or of one of its end customers (the key in the business systems).

    The lines of the audit trail stay, without the customer's name. Returns the number of rows.
    """
    count = 0
    for table in (Conversation, Idempotency, ProposedAction, InboxTicket):
        mine = [table.tenant == tenant] + ([] if customer is None else [table.customer == customer])
        count += session.execute(sa.delete(table).where(*mine)).rowcount  # type: ignore[attr-defined]
    lines = [Audit.tenant == tenant, Audit.customer != ""] + ([] if customer is None else [Audit.customer == customer])
    session.execute(sa.update(Audit).where(*lines).values(customer=""))
    return count
