"""Keys by API: an administrator makes, lists, rotates and revokes the keys of its own tenant.

It gives no scope that it does not have itself, and sees a key once, when it is made.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Annotated, Any

import orjson
import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.callers import ANONYMOUS, Caller, Scope
from services.gateway.auth.keys import create_key, revoke_key
from services.gateway.bodies import read_body
from services.gateway.documentation import GET_ERRORS, POST_ERRORS, json_body
from services.gateway.openai.schema import Wire
from services.gateway.recorder import Record, Recorder, audit_row
from services.gateway.store import ApiKey, KeyUse
from steersman.errors import NotFoundError, PermissionDeniedError
from steersman.store.engine import Store
from steersman.store.models import now

Limit = Annotated[int, Field(gt=0, lt=2**31)] | None
_LISTED = 1000


class NewKey(Wire):
    """A key to be made."""

    scopes: Annotated[list[Scope], Field(min_length=1, max_length=10)]
    """What it may do; no more than the key that asks."""
    note: Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")] = ""
    """Whose it is."""
    days: Annotated[float, Field(gt=0, le=3650)] | None = None
    """Lifetime; without it the key does not expire."""
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    tokens_per_day: Limit = None
    concurrent: Limit = None
    """Answers at once."""


class Rotation(Wire):
    """How a key gives way to a new one."""

    grace_seconds: Annotated[float, Field(ge=0, le=30 * 24 * 3600)] = 3600.0
    """The old key still works for so long."""


def keys_router(store: Store, auth: Authenticator, recorder: Recorder) -> APIRouter:
    router = APIRouter(prefix="/v1/keys", tags=["Keys"])
    made: dict[int | str, dict[str, Any]] = {
        200: {"description": "The key; it is not seen again.", "content": {"application/json": {}}},
        **POST_ERRORS,
    }

    async def administrator(request: Request) -> Caller:
        caller = await auth.caller(request.headers)
        caller.require("admin")
        if caller.key_id == ANONYMOUS:
            raise PermissionDeniedError("Keys are managed with a key of scope 'admin'; make one on the command line")
        return caller

    async def note(request: Request, caller: Caller, what: str, key_id: str) -> None:
        row = audit_row(caller, request.state.request_id, "keys", what, records=[{"key": key_id}])
        await recorder.put(Record(row))

    @router.post("", summary="Make a key", openapi_extra=json_body(NewKey), responses=made)
    async def make(request: Request) -> Response:
        caller = await administrator(request)
        body = await read_body(request, NewKey)
        _check_scopes(caller, body.scopes)
        settings = body.model_dump(exclude={"scopes"})
        key = await asyncio.to_thread(create_key, store, caller.tenant, body.scopes, **settings)
        await note(request, caller, "create", _id(key))
        return _json({"id": _id(key), "key": key})

    @router.get("", summary="The tenant's keys and what they used", responses={**GET_ERRORS})
    async def listed(request: Request) -> Response:
        caller = await administrator(request)
        return _json({"object": "list", "data": await asyncio.to_thread(_list, store, caller.tenant)})

    @router.post("/{key_id}/rotate", summary="Replace a key", openapi_extra=json_body(Rotation), responses=made)
    async def rotate(request: Request, key_id: str) -> Response:
        caller = await administrator(request)
        body = await read_body(request, Rotation)
        key = await asyncio.to_thread(_rotate, store, caller, key_id, body.grace_seconds)
        await note(request, caller, "rotate", key_id)
        return _json({"id": _id(key), "key": key, "replaces": key_id})

    @router.delete("/{key_id}", summary="Revoke a key", responses={**GET_ERRORS})
    async def revoke(request: Request, key_id: str) -> Response:
        caller = await administrator(request)
        await asyncio.to_thread(_own, store, caller, key_id)
        await asyncio.to_thread(revoke_key, store, key_id)
        await note(request, caller, "revoke", key_id)
        return _json({"id": key_id, "revoked": True})

    return router


def _json(data: Any) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(orjson.dumps(data), headers=headers, media_type="application/json")


def _id(key: str) -> str:
    return key.split("-")[1]


def _check_scopes(caller: Caller, scopes: list[Scope]) -> None:
    beyond = sorted(set(scopes) - caller.scopes)
    if beyond:
        raise PermissionDeniedError(f"This key cannot give the scopes {', '.join(beyond)}, which it does not have")


def _own(store: Store, caller: Caller, key_id: str) -> ApiKey:
    with store.reading() as session:
        key = session.get(ApiKey, key_id)
    if key is None or key.tenant != caller.tenant:
        raise NotFoundError(f"There is no key '{key_id[:16]}'")
    return key


def _rotate(store: Store, caller: Caller, key_id: str, grace_seconds: float) -> str:
    old = _own(store, caller, key_id)
    if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now()):
        raise NotFoundError(f"The key '{key_id}' has expired or was revoked; make a new one")
    _check_scopes(caller, old.scopes)
    limits = {
        name: getattr(old, name)
        for name in ("note", "requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrent")
    }
    days = (old.expires_at - now()).total_seconds() / 86_400 if old.expires_at is not None else None
    key = create_key(store, old.tenant, old.scopes, days=days, **limits)
    with store.transaction() as session:
        ends = now() + dt.timedelta(seconds=grace_seconds)
        row = session.get_one(ApiKey, key_id)
        row.expires_at = min(ends, row.expires_at) if row.expires_at is not None else ends
    return key


def _list(store: Store, tenant: str) -> list[dict[str, Any]]:
    today, month = now().date(), now().date() - dt.timedelta(days=30)
    with store.reading() as session:
        keys = session.scalars(
            sa.select(ApiKey).where(ApiKey.tenant == tenant).order_by(ApiKey.created_at.desc()).limit(_LISTED)
        ).all()
        used: dict[str, dict[str, dict[str, int]]] = {}
        for use in session.scalars(
            sa.select(KeyUse).where(KeyUse.key_id.in_([key.id for key in keys]), KeyUse.day > month)
        ):
            spans = used.setdefault(use.key_id, {})
            for span in ("today", "last_30_days") if use.day == today else ("last_30_days",):
                sums = spans.setdefault(span, {"requests": 0, "tokens": 0})
                sums["requests"] += use.requests
                sums["tokens"] += use.tokens
    nothing = {"requests": 0, "tokens": 0}
    return [
        {
            "id": key.id,
            "scopes": key.scopes,
            "note": key.note,
            "requests_per_minute": key.requests_per_minute,
            "tokens_per_minute": key.tokens_per_minute,
            "tokens_per_day": key.tokens_per_day,
            "concurrent": key.concurrent,
            "created_at": key.created_at.isoformat(),
            "expires_at": key.expires_at.isoformat() if key.expires_at else None,
            "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
            "used": {span: used.get(key.id, {}).get(span, nothing) for span in ("today", "last_30_days")},
        }
        for key in keys
    ]
