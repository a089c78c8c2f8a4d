"""The gateway's own tables: keys, use of quotas, audit trail, conversations, idempotency keys.

Answers and feedback lie in `steersman.store`, because training reads them.
"""

from __future__ import annotations

import datetime as dt
import secrets
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from steersman.store.engine import Store
from steersman.store.models import BigKey, Json, UtcDateTime, now


class GatewayBase(DeclarativeBase):
    metadata = sa.MetaData()
    type_annotation_map = {dict[str, Any]: Json, list[Any]: Json, dt.datetime: UtcDateTime}


class Secret(GatewayBase):
    """Keys with which the gateway signs for itself; shared by all replicas on one database."""

    __tablename__ = "gateway_secrets"

    name: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    value: Mapped[str] = mapped_column(sa.String(64))


class ApiKey(GatewayBase):
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
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    expires_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]


class KeyUse(GatewayBase):
    """What a key used on a day."""

    __tablename__ = "gateway_key_use"

    key_id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    day: Mapped[dt.date] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(sa.BigInteger)
    tokens: Mapped[int] = mapped_column(sa.BigInteger)


class Audit(GatewayBase):
    """One line of the audit trail. It holds references, no texts."""

    __tablename__ = "gateway_audit"
    __table_args__ = (sa.Index("ix_gateway_audit_at", "at"), sa.Index("ix_gateway_audit_answer", "answer_id"))

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    at: Mapped[dt.datetime] = mapped_column(default=now)
    request_id: Mapped[str] = mapped_column(sa.String(128))
    action: Mapped[str] = mapped_column(sa.String(32))
    """answer, feedback, act, handover."""
    outcome: Mapped[str] = mapped_column(sa.String(32))
    """Finish reason, or the error's class."""
    tenant: Mapped[str] = mapped_column(sa.String(200))
    key_id: Mapped[str] = mapped_column(sa.String(64))
    customer: Mapped[str] = mapped_column(sa.String(200))
    """The end customer."""
    answer_id: Mapped[str] = mapped_column(sa.String(64), default="")
    records: Mapped[list[Any]] = mapped_column(default=list)
    """Business records that were read or written."""
    weights_version: Mapped[str] = mapped_column(sa.String(64), default="")
    prompt_tokens: Mapped[int] = mapped_column(default=0)
    completion_tokens: Mapped[int] = mapped_column(default=0)
    milliseconds: Mapped[int] = mapped_column(default=0)
    first_token_milliseconds: Mapped[int] = mapped_column(default=0)


class Conversation(GatewayBase):
    """Remembered turns; they belong to one tenant and customer."""

    __tablename__ = "gateway_conversations"
    __table_args__ = (sa.Index("ix_gateway_conversations_expires_at", "expires_at"),)

    tenant: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    customer: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    turns: Mapped[list[Any]]
    expires_at: Mapped[dt.datetime]


class Idempotency(GatewayBase):
    """A request that must not be carried out twice, and its result."""

    __tablename__ = "gateway_idempotency"
    __table_args__ = (sa.Index("ix_gateway_idempotency_expires_at", "expires_at"),)

    scope: Mapped[str] = mapped_column(sa.String(400), primary_key=True)
    """Tenant, customer and route."""
    key: Mapped[str] = mapped_column(sa.String(255), primary_key=True)
    request_digest: Mapped[str] = mapped_column(sa.String(64))
    result: Mapped[dict[str, Any] | None] = mapped_column(
        sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
    )
    """None while the first request runs."""
    expires_at: Mapped[dt.datetime]


class ProposedAction(GatewayBase):
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


def open_store(url: str) -> Store:
    """Opens the database with the tables of `steersman.store` and the gateway's own."""
    store = Store.open(url)
    GatewayBase.metadata.create_all(store.engine)
    return store


def storable(text: str) -> str:
    """PostgreSQL has no NUL character."""
    return text.replace("\0", "")


def insert_new(session: Session, table: type[GatewayBase], row: dict[str, Any]) -> bool:
    """Inserts a row; False when its primary key is taken."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    key = sa.inspect(table).primary_key[0]
    # Not the row count: with PostgreSQL's driver it may be unknown.
    made = session.execute(insert(table).values(row).on_conflict_do_nothing().returning(key))
    return made.first() is not None


def shared_secret(store: Store, name: str) -> bytes:
    """256 random bits that every gateway on this database sees."""
    with store.transaction() as session:
        insert_new(session, Secret, {"name": name, "value": secrets.token_hex(32)})
        return bytes.fromhex(session.get_one(Secret, name).value)
