"""Which end customer is asking: from a verified JWT, or from a trusted back end's signed header. From nothing else.

X-Customer-Token: <JWT>
X-Customer: <id>  and  X-Customer-Signature: t=<unix seconds>,v2=<HMAC-SHA256 hex of "t\\ntenant\\nid">

`v1`, of "t.tenant.id", is taken where neither tenant nor id has a dot: elsewhere it would be good for others, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import jwt

from services.gateway.auth.callers import Customer
from services.gateway.config import IdentityConfig, JwtIssuer
from services.gateway.fetching import fetch_json
from steersman.environment import secret_in
from steersman.errors import SteersmanError, UnauthenticatedError, UnavailableError
from steersman.net import guarded_client

log = logging.getLogger("steersman.gateway")

TOKEN_HEADER = "x-customer-token"
CUSTOMER_HEADER = "x-customer"
SIGNATURE_HEADER = "x-customer-signature"
# No control characters, which would be borders in what is signed, and no halves of characters, which nothing stores.
_CUSTOMER_ID = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,200}")
_SIGNATURE = re.compile(r"t=([0-9]{1,12}),v([12])=([0-9a-f]{64})")
_LARGEST_KEY_SET = 1024 * 1024
_LONGEST_PAUSE = 60.0
_LONGEST_TOKEN = 8192


class CustomerVerifier:
    def __init__(self, config: IdentityConfig) -> None:
        self._issuers = {issuer.issuer: _Issuer(issuer) for issuer in config.jwt}
        self._local = Customer(config.local_customer, "local") if config.local_customer is not None else None
        self._secret = b""
        self._max_age = 0.0
        if config.signed_header is not None:
            signed = config.signed_header
            self._secret = secret_in(signed.secret_env, "identity.signedHeader.secretEnv", least=32).encode()
            self._max_age = signed.max_age_seconds

    async def verify(self, headers: Mapping[str, str], tenant: str) -> Customer | None:
        """The customer, or None when the request names none.

        Raises:
            UnauthenticatedError: a token or header that cannot be trusted.
        """
        token, name = headers.get(TOKEN_HEADER), headers.get(CUSTOMER_HEADER)
        if token is not None and name is not None:
            raise UnauthenticatedError(f"Send either {TOKEN_HEADER} or {CUSTOMER_HEADER}, not both")
        if token is not None:
            return await self._from_token(token, tenant)
        if name is not None:
            return self._from_header(name, headers.get(SIGNATURE_HEADER, ""), tenant)
        if headers.get(SIGNATURE_HEADER) is not None:
            raise UnauthenticatedError(f"{SIGNATURE_HEADER} came without {CUSTOMER_HEADER}")
        return self._local

    async def _from_token(self, token: str, tenant: str) -> Customer:
        refusal = UnauthenticatedError("The customer token is not valid; get a fresh one")
        if len(token) > _LONGEST_TOKEN:
            raise refusal
        try:
            header = jwt.get_unverified_header(token)
            claims = jwt.decode(token, options={"verify_signature": False})
        except (jwt.PyJWTError, ValueError):
            raise refusal from None
        issuer = self._issuers.get(str(claims.get("iss")))
        if issuer is None or not issuer.serves(tenant):
            raise refusal
        return await issuer.verify(token, header, refusal)

    def _from_header(self, customer: str, signature: str, tenant: str) -> Customer:
        match = _SIGNATURE.fullmatch(signature)
        if not self._secret or match is None or not _CUSTOMER_ID.fullmatch(customer):
            raise UnauthenticatedError(f"{CUSTOMER_HEADER} is not signed in a way that is trusted here")
        moment, version, given = match.groups()
        about = (self._secret, customer, tenant, int(moment))
        good = hmac.compare_digest(given, sign_customer(*about))
        if version == "1" and "." not in tenant + customer:
            good |= hmac.compare_digest(given, _sign_customer_v1(*about))
        if not good:
            raise UnauthenticatedError(f"{CUSTOMER_HEADER} is not signed in a way that is trusted here")
        if abs(time.time() - int(moment)) > self._max_age:
            raise UnauthenticatedError(f"{SIGNATURE_HEADER} is too old; sign every request anew")
        return Customer(customer, "signed-header")


def sign_customer(secret: bytes, customer: str, tenant: str, moment: int) -> str:
    """What a trusted back end puts into `v2=`; neither name holds a line end, so the borders are clear."""
    return hmac.new(secret, f"{moment}\n{tenant}\n{customer}".encode(), hashlib.sha256).hexdigest()


def _sign_customer_v1(secret: bytes, customer: str, tenant: str, moment: int) -> str:
    """What older back ends put into `v1=`."""
    return hmac.new(secret, f"{moment}.{tenant}.{customer}".encode(), hashlib.sha256).hexdigest()


class _Issuer:
    """One issuer of tokens and its rotating keys."""

    def __init__(self, config: JwtIssuer) -> None:
        self._config = config
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched = float("-inf")
        self._failed = float("-inf")
        self._pause = 0.0
        """After a failure nobody asks again for so long."""
        self._fetching: asyncio.Task[None] | None = None

    def serves(self, tenant: str) -> bool:
        return not self._config.tenants or tenant in self._config.tenants

    async def verify(self, token: str, header: Mapping[str, Any], refusal: UnauthenticatedError) -> Customer:
        config = self._config
        key = await self._key(str(header.get("kid", "")))
        if key is None:
            raise refusal
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=list(config.algorithms),
                audience=config.audience,
                issuer=config.issuer,
                leeway=config.leeway_seconds,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise UnauthenticatedError("The customer token has expired; get a fresh one") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise refusal from None
        customer = claims.get(config.customer_claim)
        if not isinstance(customer, str) or not _CUSTOMER_ID.fullmatch(customer):
            raise refusal
        return Customer(customer, config.issuer)

    async def _key(self, key_id: str) -> jwt.PyJWK | None:
        """A key by its id; an unknown id makes us look for rotated keys, but not more often than allowed."""
        age = time.monotonic() - self._fetched
        if age > self._config.refresh_seconds or (key_id not in self._keys and age > self._config.lookup_seconds):
            if time.monotonic() - self._failed >= self._pause:
                await self._fetch_once()
            if not self._keys:
                raise UnavailableError(f"The keys of {self._config.issuer} cannot be read; try again later")
        return self._keys.get(key_id)

    async def _fetch_once(self) -> None:
        """Fetches, together with all who want the same at this moment."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
            self._fetching.add_done_callback(self._fetched_once)
        await asyncio.shield(self._fetching)

    def _fetched_once(self, task: asyncio.Task[None]) -> None:
        self._fetching = None

    async def _fetch(self) -> None:
        try:
            document = await self._read()
            keys = jwt.PyJWKSet.from_dict(document).keys
        except (
            httpx.HTTPError,
            OSError,
            ValueError,
            TypeError,
            AttributeError,
            jwt.PyJWTError,
            SteersmanError,
        ) as error:
            log.warning("the keys of an issuer cannot be read: %s", error, extra={"issuer": self._config.issuer})
            self._failed = time.monotonic()
            self._pause = min(max(2 * self._pause, 1.0), _LONGEST_PAUSE)
            return
        self._keys = {key.key_id: key for key in keys if key.key_id and key.key_type != "oct"}
        self._fetched, self._pause = time.monotonic(), 0.0

    async def _read(self) -> Any:
        source = self._config.jwks
        if not source.startswith(("http://", "https://")):
            return json.loads(await asyncio.to_thread(Path(source).read_bytes))
        async with guarded_client(timeout=5.0) as client:
            return await fetch_json(client, "GET", source, largest=_LARGEST_KEY_SET)
