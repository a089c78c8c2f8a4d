"""Keys by API: an administrator makes, lists, changes, rotates and revokes the keys of its own tenant.

It gives no scope that it does not have itself, and sees a key once, when it is made.

    POST   /v1/keys               NewKey -> MadeKey
    GET    /v1/keys               newest first, ?limit=&after=ID&state= -> KeyList
    GET    /v1/keys/{id}          -> KeyHistory: a key, and what it used day by day
    PATCH  /v1/keys/{id}          KeyChange -> Key; what is left out stays, null takes a limit away
    POST   /v1/keys/{id}/rotate   Rotation -> MadeKey
    DELETE /v1/keys/{id}          -> Key

Every change is a line of the audit trail (action `keys`). All days and months are UTC's.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Sequence, Set
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.callers import ANONYMOUS, LIMITS, Caller, Scope
from services.gateway.auth.keys import LARGEST_LIMIT, create_key
from services.gateway.bodies import read_body
from services.gateway.documentation import GET_ERRORS, POST_ERRORS, json_body
from services.gateway.openai.schema import Wire
from services.gateway.quotas import month_of
from services.gateway.recorder import Record, Recorder, audit_row
from services.gateway.store import ApiKey, KeyUse, Reservation
from steersman.errors import ConflictError, NotFoundError, PermissionDeniedError
from steersman.store.engine import Store
from steersman.store.models import now

Limit = Annotated[int, Field(gt=0, le=LARGEST_LIMIT)] | None
Days = Annotated[float, Field(gt=0, le=3650)] | None
Scopes = Annotated[list[Scope], Field(min_length=1, max_length=10)]
Note = Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")]
State = Literal["active", "expired", "revoked"]

_MOST_ACTIVE = 1000
"""Keys of one tenant that work at the same time."""
_HISTORY_DAYS = 90


class _Limits(Wire):
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    tokens_per_day: Limit = None
    tokens_per_month: Limit = None
    """Budget of the calendar month."""
    concurrent: Limit = None
    """Answers at once."""


class NewKey(_Limits):
    """A key to be made."""

    scopes: Scopes
    """What it may do; no more than the key that asks."""
    note: Note = ""
    """Whose it is."""
    days: Days = None
    """Lifetime; without it the key does not expire."""


class KeyChange(_Limits):
    """What is to be otherwise. A field that is left out stays; null takes a limit, or the end of the lifetime, away."""

    scopes: Scopes = ["chat"]
    """What it may do; nothing new that the key that asks does not have."""
    note: Note = ""
    days: Days = None
    """Lifetime from now on."""


class Rotation(Wire):
    """How a key gives way to a new one."""

    grace_seconds: Annotated[float, Field(ge=0, le=30 * 24 * 3600)] = 3600.0
    """The old key still works for so long."""


class _Shown(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Used(_Shown):
    requests: int = 0
    tokens: int = 0


class UsedSpans(_Shown):
    today: Used = Field(default_factory=Used)
    this_month: Used = Field(default_factory=Used)
    last_30_days: Used = Field(default_factory=Used)


class UsedOn(Used):
    day: dt.date


class Key(_Shown):
    """A key as an administrator sees it: never its secret."""

    object: Literal["key"] = "key"
    id: str
    """The middle part of the key; it may stand in logs."""
    state: State
    scopes: list[str]
    note: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None
    tokens_per_month: int | None
    concurrent: int | None
    created_at: dt.datetime
    expires_at: dt.datetime | None
    revoked_at: dt.datetime | None
    used: UsedSpans
    last_used_on: dt.date | None
    running: int | None
    """Answers at this moment; null where the key has no limits, for nobody counts them then."""


class KeyHistory(Key):
    days: list[UsedOn]
    """The last 90 days on which it was used, the newest first."""


class KeyList(_Shown):
    object: Literal["list"] = "list"
    data: list[Key]
    has_more: bool
    """There are older ones: send the last id as `after`."""


class MadeKey(_Shown):
    id: str
    key: str
    """The key itself: it is not seen again."""
    replaces: str | None = None
    """The key that ends after the grace."""


async def administrator(request: Request, auth: Authenticator) -> Caller:
    """Who may manage keys; a gateway without keys lets everybody do everything but that."""
    caller = await auth.caller(request.headers)
    caller.require("admin")
    if caller.key_id == ANONYMOUS:
        raise PermissionDeniedError(
            "Keys are managed with a key of scope 'admin'; make the first one with "
            "`python -m services.gateway.auth.keys --database URL create --tenant NAME --scope admin`"
        )
    return caller


def keys_router(store: Store, auth: Authenticator, recorder: Recorder) -> APIRouter:
    router = APIRouter(prefix="/v1/keys", tags=["Keys"])

    async def note(request: Request, caller: Caller, what: str, key_id: str, **more: Any) -> None:
        """A line of the audit trail; from now on the key counts as it is in the database."""
        auth.keys.forget(key_id)
        row = audit_row(caller, request.state.request_id, "keys", what, records=[{"key": key_id, **more}])
        await recorder.put(Record(row))

    @router.post("", summary="Make a key", openapi_extra=json_body(NewKey), responses=_shows(MadeKey, POST_ERRORS))
    async def make(request: Request) -> Response:
        caller = await administrator(request, auth)
        body = await read_body(request, NewKey)
        key = await asyncio.to_thread(_make, store, caller, body)
        await note(request, caller, "create", _id(key))
        return _json(MadeKey(id=_id(key), key=key))

    @router.get("", summary="The tenant's keys and what they used", responses=_shows(KeyList, _LIST_ERRORS))
    async def listed(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str, Query(max_length=64)] = "",
        state: State | None = None,
    ) -> Response:
        caller = await administrator(request, auth)
        return _json(await asyncio.to_thread(_list, store, caller, limit, after, state))

    @router.get("/{key_id}", summary="A key, day by day", responses=_shows(KeyHistory, GET_ERRORS))
    async def described(request: Request, key_id: str) -> Response:
        caller = await administrator(request, auth)
        return _json(await asyncio.to_thread(_history, store, caller, key_id))

    @router.patch(
        "/{key_id}",
        summary="Change what a key may",
        openapi_extra=json_body(KeyChange),
        responses=_shows(Key, POST_ERRORS),
    )
    async def change(request: Request, key_id: str) -> Response:
        caller = await administrator(request, auth)
        body = await read_body(request, KeyChange)
        changed = await asyncio.to_thread(_change, store, caller, key_id, body)
        await note(request, caller, "change", key_id, fields=sorted(body.model_fields_set))
        return _json(changed)

    @router.post(
        "/{key_id}/rotate",
        summary="Replace a key",
        openapi_extra=json_body(Rotation),
        responses=_shows(MadeKey, POST_ERRORS),
    )
    async def rotate(request: Request, key_id: str) -> Response:
        caller = await administrator(request, auth)
        body = await read_body(request, Rotation)
        key = await asyncio.to_thread(_rotate, store, caller, key_id, body.grace_seconds)
        await note(request, caller, "rotate", key_id, by=_id(key))
        return _json(MadeKey(id=_id(key), key=key, replaces=key_id))

    @router.delete("/{key_id}", summary="Revoke a key", responses=_shows(Key, GET_ERRORS))
    async def revoke(request: Request, key_id: str) -> Response:
        caller = await administrator(request, auth)
        revoked = await asyncio.to_thread(_revoke, store, caller, key_id)
        await note(request, caller, "revoke", key_id)
        return _json(revoked)

    return router


_LIST_ERRORS = {**GET_ERRORS, 400: POST_ERRORS[400]}


def _shows(model: type[BaseModel], errors: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model}, **errors}


def _json(shown: BaseModel) -> Response:
    return Response(shown.model_dump_json(), headers={"cache-control": "no-store"}, media_type="application/json")


def _id(key: str) -> str:
    return key.split("-")[1]


def _check_scopes(caller: Caller, scopes: Set[str]) -> None:
    beyond = sorted(scopes - caller.scopes)
    if beyond:
        raise PermissionDeniedError(f"This key cannot give the scopes {', '.join(beyond)}, which it does not have")


def _own(session: Session, caller: Caller, key_id: str) -> ApiKey:
    key = session.get(ApiKey, key_id) if key_id.isascii() and key_id.isalnum() else None
    if key is None or key.tenant != caller.tenant:
        raise NotFoundError(f"There is no key {key_id[:16]!r}")
    return key


def _is(state: State) -> sa.ColumnElement[bool]:
    """Whether a key is in a state; see `_state`."""
    past = ApiKey.expires_at.is_not(None) & (ApiKey.expires_at <= now())
    revoked = ApiKey.revoked_at.is_not(None)
    return {"active": ~revoked & ~past, "expired": ~revoked & past, "revoked": revoked}[state]


def _state(key: ApiKey) -> State:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now() else "active"


def _make(store: Store, caller: Caller, body: NewKey) -> str:
    _check_scopes(caller, set(body.scopes))
    with store.reading() as session:
        active = sa.select(sa.func.count()).select_from(ApiKey).where(ApiKey.tenant == caller.tenant, _is("active"))
        if (session.scalar(active) or 0) >= _MOST_ACTIVE:
            raise ConflictError(f"{_MOST_ACTIVE} keys are in use already; revoke those that nobody needs")
    return create_key(store, caller.tenant, body.scopes, **body.model_dump(exclude={"scopes"}))


def _change(store: Store, caller: Caller, key_id: str, body: KeyChange) -> Key:
    with store.transaction() as session:
        key = _own(session, caller, key_id)
        if key.revoked_at is not None:
            raise ConflictError(f"The key {key_id!r} was revoked; make a new one")
        said = body.model_dump(exclude_unset=True)
        if "scopes" in said:
            _check_scopes(caller, set(body.scopes).difference(key.scopes))
            key.scopes = sorted(set(body.scopes))
        if "days" in said:
            key.expires_at = now() + dt.timedelta(days=body.days) if body.days else None
        for name in ("note", *LIMITS):
            if name in said:
                setattr(key, name, said[name])
    return _one(store, caller, key_id)


def _rotate(store: Store, caller: Caller, key_id: str, grace_seconds: float) -> str:
    with store.reading() as session:
        old = _own(session, caller, key_id)
    if _state(old) != "active":
        raise NotFoundError(f"The key {key_id!r} has expired or was revoked; make a new one")
    _check_scopes(caller, set(old.scopes))
    kept = {name: getattr(old, name) for name in ("note", *LIMITS)}
    days = (old.expires_at - now()).total_seconds() / 86_400 if old.expires_at is not None else None
    key = create_key(store, old.tenant, old.scopes, days=days, **kept)
    with store.transaction() as session:
        ends = now() + dt.timedelta(seconds=grace_seconds)
        row = session.get_one(ApiKey, key_id)
        row.expires_at = min(ends, row.expires_at) if row.expires_at is not None else ends
    return key


def _revoke(store: Store, caller: Caller, key_id: str) -> Key:
    with store.transaction() as session:
        key = _own(session, caller, key_id)
        key.revoked_at = key.revoked_at or now()
    return _one(store, caller, key_id)


def _list(store: Store, caller: Caller, limit: int, after: str, state: State | None) -> KeyList:
    wanted = sa.select(ApiKey).where(ApiKey.tenant == caller.tenant)
    if state is not None:
        wanted = wanted.where(_is(state))
    with store.reading() as session:
        if after:
            last = _own(session, caller, after)
            older = sa.tuple_(ApiKey.created_at, ApiKey.id) < sa.tuple_(last.created_at, last.id)
            wanted = wanted.where(older)
        newest = wanted.order_by(ApiKey.created_at.desc(), ApiKey.id.desc()).limit(limit + 1)
        keys = session.scalars(newest).all()
        return KeyList(data=_shown(session, keys[:limit]), has_more=len(keys) > limit)


def _one(store: Store, caller: Caller, key_id: str) -> Key:
    with store.reading() as session:
        return _shown(session, [_own(session, caller, key_id)])[0]


def _history(store: Store, caller: Caller, key_id: str) -> KeyHistory:
    with store.reading() as session:
        (shown,) = _shown(session, [_own(session, caller, key_id)])
        uses = session.scalars(
            sa.select(KeyUse).where(KeyUse.key_id == key_id).order_by(KeyUse.day.desc()).limit(_HISTORY_DAYS)
        )
        days = [UsedOn(day=use.day, requests=use.requests, tokens=use.tokens) for use in uses]
    return KeyHistory(**shown.model_dump(), days=days)


def _shown(session: Session, keys: Sequence[ApiKey]) -> list[Key]:
    """Keys with what they used and what they are answering now."""
    ids = [key.id for key in keys]
    today = now().date()
    month, recent = month_of(now())[0], today - dt.timedelta(days=29)
    used = {key_id: UsedSpans() for key_id in ids}
    spans = {"today": today, "this_month": month, "last_30_days": recent}
    for use in session.scalars(sa.select(KeyUse).where(KeyUse.key_id.in_(ids), KeyUse.day >= min(month, recent))):
        for name, first in spans.items():
            if use.day >= first:
                span: Used = getattr(used[use.key_id], name)
                span.requests += use.requests
                span.tokens += use.tokens
    last_days = sa.select(KeyUse.key_id, sa.func.max(KeyUse.day)).where(KeyUse.key_id.in_(ids)).group_by(KeyUse.key_id)
    last: dict[str, dt.date] = dict(session.execute(last_days).tuples().all())
    held = (
        sa.select(Reservation.key_id, sa.func.count())
        .where(Reservation.key_id.in_(ids), Reservation.expires_at >= now())
        .group_by(Reservation.key_id)
    )
    running: dict[str, int] = dict(session.execute(held).tuples().all())
    return [
        Key(
            id=key.id,
            state=_state(key),
            scopes=key.scopes,
            note=key.note,
            created_at=key.created_at,
            expires_at=key.expires_at,
            revoked_at=key.revoked_at,
            used=used[key.id],
            last_used_on=last.get(key.id),
            running=running.get(key.id, 0) if any(getattr(key, name) for name in LIMITS) else None,
            **{name: getattr(key, name) for name in LIMITS},
        )
        for key in keys
    ]
