"""API keys: `sk-<id>-<secret>`, of which only the id and a hash of the secret are kept.

python -m services.gateway.auth.keys [--database URL] create --tenant acme --scope chat --scope feedback
python -m services.gateway.auth.keys [--database URL] list
python -m services.gateway.auth.keys [--database URL] revoke ID
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import hashlib
import hmac
import os
import re
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeVar

import sqlalchemy as sa

from services.gateway.auth.callers import ALL_SCOPES, LIMITS, Caller
from services.gateway.auth.origin import Attempts
from services.gateway.store import ApiKey, open_store
from steersman.errors import InvalidArgumentError, NotFoundError, SteersmanError, UnauthenticatedError
from steersman.store.engine import Store
from steersman.store.models import now

_FORMAT = re.compile(r"sk-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_TENANT = re.compile("[^\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]{1,200}")
_NO_DIGEST = "0" * 64
DATABASE_ENV = "STEERSMAN_DATABASE"
"""As the chart sets it: the URL holds a password, which arguments would show to everybody on the machine."""
_CACHE_SECONDS = 10.0
"""A revoked key works at most this much longer."""
_CACHE_SIZE = 10_000
LARGEST_LIMIT = 2**31 - 1
V = TypeVar("V")
_MISSES_PER_MINUTE = 3000
"""Unknown key ids that are looked for in the database, of all callers together."""


def create_key(
    store: Store,
    tenant: str,
    scopes: Iterable[str],
    *,
    note: str = "",
    days: float | None = None,
    **limits: int | None,
) -> str:
    """Stores a new key and returns it: the only time that it is seen. `limits`: of `callers.LIMITS`; None: no limit."""
    scopes = set(scopes)
    unknown = scopes - ALL_SCOPES
    if unknown or not scopes:
        raise InvalidArgumentError(f"scope: {sorted(unknown)} unknown; choose from {', '.join(sorted(ALL_SCOPES))}")
    if not _TENANT.fullmatch(tenant):
        raise InvalidArgumentError("tenant: give 1 to 200 printable characters")
    for name, limit in limits.items():
        if limit is not None and not 0 < limit <= LARGEST_LIMIT:
            raise InvalidArgumentError(f"{name}: must be between 1 and {LARGEST_LIMIT}; leave it out for no limit")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    with store.transaction() as session:
        session.add(
            ApiKey(
                id=key_id,
                digest=_digest(secret),
                tenant=tenant,
                scopes=sorted(scopes),
                note=note,
                expires_at=now() + dt.timedelta(days=days) if days else None,
                **limits,
            )
        )
    return f"sk-{key_id}-{secret}"


def revoke_key(store: Store, key_id: str) -> None:
    """Raises NotFoundError for an unknown id."""
    with store.transaction() as session:
        key = session.get(ApiKey, key_id)
        if key is None:
            raise NotFoundError(f"There is no key '{key_id}'; `list` shows all")
        key.revoked_at = key.revoked_at or now()


class KeyRing:
    """Verifies keys; remembers them for some seconds.

    Ids that nobody has are remembered apart, so that guesses push no real key out, and only so many are looked for.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, tuple[float, str, Caller]] = OrderedDict()
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._misses = Attempts(_MISSES_PER_MINUTE, "unknown keys")

    async def verify(self, key: str) -> Caller:
        """Raises UnauthenticatedError; the message does not say which part is wrong."""
        match = _FORMAT.fullmatch(key)
        digest, caller = await self._find(match.group(1)) if match else ("", None)
        # Compared in any case, so that the time does not tell whether the id exists.
        same = hmac.compare_digest(digest or _NO_DIGEST, _digest(match.group(2) if match else ""))
        if caller is None or not same:
            raise UnauthenticatedError("The API key is not valid, has expired or was revoked; use another key")
        return caller

    async def _find(self, key_id: str) -> tuple[str, Caller | None]:
        moment = time.monotonic()
        cached = self._known.get(key_id)
        if cached is not None and cached[0] > moment:
            return cached[1], cached[2]
        if self._unknown.get(key_id, 0.0) > moment:
            return "", None
        if cached is None:
            self._misses.check("")
        digest, caller = await asyncio.to_thread(self._load, key_id)
        if caller is None:
            self._known.pop(key_id, None)
            self._misses.count("")
            _remember(self._unknown, key_id, moment + _CACHE_SECONDS)
        else:
            _remember(self._known, key_id, (moment + _CACHE_SECONDS, digest, caller))
        return digest, caller

    def forget(self, key_id: str) -> None:
        """A key has changed or ended: here at once, at other gateways after some seconds."""
        self._known.pop(key_id, None)

    async def by_id(self, key_id: str) -> Caller:
        """The caller of a session that was begun with a key; the same errors."""
        _, caller = await asyncio.to_thread(self._load, key_id)
        if caller is None:
            raise UnauthenticatedError("The session's key has expired or was revoked; log in again")
        return caller

    def _load(self, key_id: str) -> tuple[str, Caller | None]:
        with self._store.reading() as session:
            key = session.get(ApiKey, key_id)
        if key is None or key.revoked_at or (key.expires_at and key.expires_at <= now()):
            return "", None
        caller = Caller(
            key_id=key.id,
            tenant=key.tenant,
            scopes=frozenset(key.scopes),
            name=key.note or key.id,
            **{name: getattr(key, name) for name in LIMITS},
        )
        return key.digest, caller


def _remember(cache: OrderedDict[str, V], key_id: str, value: V) -> None:
    cache[key_id] = value
    cache.move_to_end(key_id)
    if len(cache) > _CACHE_SIZE:
        cache.popitem(last=False)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gateway.auth.keys", description="API keys.")
    parser.add_argument("--database", help=f"URL, as in the gateway's configuration; without it ${DATABASE_ENV}")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print it")
    create.add_argument("--tenant", required=True)
    create.add_argument("--scope", action="append", required=True, choices=sorted(ALL_SCOPES))
    create.add_argument("--note", default="")
    create.add_argument("--days", type=float, help="lifetime; without it the key does not expire")
    create.add_argument("--requests-per-minute", type=int)
    create.add_argument("--tokens-per-minute", type=int)
    create.add_argument("--tokens-per-day", type=int)
    create.add_argument("--tokens-per-month", type=int, help="of the calendar month")
    create.add_argument("--concurrent", type=int, help="answers at once")
    commands.add_parser("list", help="show all keys")
    commands.add_parser("revoke", help="end a key").add_argument("id")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        database = options.pop("database") or os.environ.get(DATABASE_ENV)
        if not database:
            raise InvalidArgumentError(f"--database is missing, and {DATABASE_ENV} is not set; give one of them")
        store = open_store(database)
        if command == "create":
            print(create_key(store, options.pop("tenant"), options.pop("scope"), **options))
        elif command == "revoke":
            revoke_key(store, options["id"])
        else:
            with store.reading() as session:
                for key in session.scalars(sa.select(ApiKey).order_by(ApiKey.created_at)):
                    state = "revoked" if key.revoked_at else f"until {key.expires_at or 'revoked'}"
                    print(f"{key.id}  {key.tenant}  {','.join(key.scopes)}  {state}  {key.note}")
    except SteersmanError as error:
        print(f"keys: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
