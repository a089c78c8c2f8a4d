"""From the headers of a request to its caller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.cookies import CookieError, SimpleCookie

from services.gateway.auth.callers import ALL_SCOPES, ANONYMOUS, Caller
from services.gateway.auth.identity import CustomerVerifier
from services.gateway.auth.keys import KeyRing
from services.gateway.auth.origin import Attempts, current_visit
from services.gateway.auth.tokens import Sessions
from services.gateway.config import GatewayConfig
from steersman.errors import UnauthenticatedError
from steersman.store.secret import pseudonym

SESSION_COOKIE = "steersman_session"
_CREDENTIALS = ("authorization", "cookie", "x-customer-token", "x-customer", "x-customer-signature")
_BY_NAME = "name-"
_OPEN = Caller(ANONYMOUS, "default", ALL_SCOPES)


class Authenticator:
    """REST headers and gRPC metadata alike: lower-case names."""

    def __init__(
        self,
        config: GatewayConfig,
        keys: KeyRing,
        sessions: Sessions,
        customers: CustomerVerifier,
        secret: bytes,
    ) -> None:
        """`secret`: what pseudonyms are made with."""
        self._secret = secret
        self._failures = Attempts(config.limits.failed_logins_per_minute, "failed logins")
        self._required = config.auth_required
        self.keys = keys
        self._sessions = sessions
        self._customers = customers

    @property
    def required(self) -> bool:
        return self._required

    async def caller(self, headers: Mapping[str, str]) -> Caller:
        """Raises UnauthenticatedError for a key, token or header that is missing or wrong.

        A wrong customer token is refused even where the question could do without it: silently answering as nobody
        would hide a forgery.
        """
        visit = current_visit()
        with self._counted(headers):
            caller = visit.caller = await self._application(headers)
            customer = await self._customers.verify(headers, caller.tenant)
        if customer is not None:
            name = pseudonym(self._secret, caller.tenant, customer.id)
            caller = visit.caller = replace(caller, customer=replace(customer, pseudonym=name))
        return caller

    def origin(self) -> str:
        """Pseudonym of the address that the request at hand comes from; empty: unknown."""
        address = current_visit().address
        return pseudonym(self._secret, "address", address) if address else ""

    @contextmanager
    def _counted(self, headers: Mapping[str, str] | None = None) -> Iterator[None]:
        """Counts credentials that are wrong; too many from one address, and nothing more is looked at for a while."""
        address = current_visit().address
        self._failures.check(address)
        try:
            yield
        except UnauthenticatedError:
            if headers is None or any(name in headers for name in _CREDENTIALS):
                self._failures.count(address)
            raise

    async def begin_session(self, key: str, name: str) -> str:
        """The cookie of a browser session: of a key, or, where no key is needed, of a person's name.

        Raises:
            UnauthenticatedError: the key is not valid.
        """
        if self._required or key:
            with self._counted():
                return self._sessions.issue((await self.keys.verify(key)).key_id)
        name = name.strip()
        if not 1 <= len(name) <= 60 or not name.isprintable():
            raise UnauthenticatedError("Say your name in 1 to 60 characters")
        # Hexadecimal: the parts of a session are separated by dots.
        return self._sessions.issue(_BY_NAME + name.encode().hex())

    async def _application(self, headers: Mapping[str, str]) -> Caller:
        scheme, _, credential = headers.get("authorization", "").partition(" ")
        credential = credential.strip()
        if scheme.lower() == "bearer" and credential.startswith("sk-"):
            return await self.keys.verify(credential)
        if (cookie := _cookie(headers)) is not None:
            subject = self._sessions.verify(cookie)
            if not subject.startswith(_BY_NAME):
                return replace(await self.keys.by_id(subject), by_session=True)
            if not self._required:
                return replace(_OPEN, name=bytes.fromhex(subject.removeprefix(_BY_NAME)).decode())
        if not self._required:
            return _OPEN
        if credential:
            raise UnauthenticatedError("The API key is not valid, has expired or was revoked; use another key")
        raise UnauthenticatedError("An API key is needed; send it as 'Authorization: Bearer sk-...'")


def _cookie(headers: Mapping[str, str]) -> str | None:
    sent = headers.get("cookie", "")
    if SESSION_COOKIE not in sent:
        return None
    try:
        found = SimpleCookie(sent).get(SESSION_COOKIE)
    except CookieError:
        return None
    return found.value if found else None
