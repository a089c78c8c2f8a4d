"""Which end customer is asking: from a verified JWT, or from a trusted back end's signed header. From nothing else.

X-Customer-Token: <JWT>
X-Customer: <id>  and  X-Customer-Signature: t=<unix seconds>,v1=<HMAC-SHA256 hex of "t.tenant.id">
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import httpx
import jwt

from services.gateway.auth.callers import Customer
from services.gateway.config import IdentityConfig, JwtIssuer
from services.gateway.fetching import fetch_json
from steersman.errors import ConfigError, UnauthenticatedError, UnavailableError

log = logging.getLogger("steersman.gateway")

TOKEN_HEADER = "x-customer-token"
CUSTOMER_HEADER = "x-customer"
SIGNATURE_HEADER = "x-customer-signature"
_CUSTOMER_ID = re.compile(r"^[^\x00-\x1f\x7f]{1,200}$")
_SIGNATURE = re.compile(r"^t=(\d{1,12}),v1=([0-9a-f]{64})$")
_LONGEST_TOKEN = 8192


class CustomerVerifier:
    def __init__(self, config: IdentityConfig) -> None:
        self._issuers = {issuer.issuer: _Issuer(issuer) for issuer in config.jwt}
        self._local = Customer(config.local_customer, "local") if config.local_customer is not None else None
        self._secret = b""
        self._max_age = 0.0
        if config.signed_header is not None:
            name = config.signed_header.secret_env
            self._secret = os.environ.get(name, "").encode()
            self._max_age = config.signed_header.max_age_seconds
            if len(self._secret) < 32:
                raise ConfigError(
                    f"identity.signedHeader.secretEnv: the environment variable {name} must hold at least 32 characters"
                )

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
        match = _SIGNATURE.match(signature)
        if not self._secret or match is None or not _CUSTOMER_ID.match(customer):
            raise UnauthenticatedError(f"{CUSTOMER_HEADER} is not signed in a way that is trusted here")
        moment, given = match.groups()
        if not hmac.compare_digest(given, sign_customer(self._secret, customer, tenant, int(moment))):
            raise UnauthenticatedError(f"{CUSTOMER_HEADER} is not signed in a way that is trusted here")
        if abs(time.time() - int(moment)) > self._max_age:
            raise UnauthenticatedError(f"{SIGNATURE_HEADER} is too old; sign every request anew")
        return Customer(customer, "signed-header")


def sign_customer(secret: bytes, customer: str, tenant: str, moment: int) -> str:
    """What a trusted back end puts into `v1=`."""
    return hmac.new(secret, f"{moment}.{tenant}.{customer}".encode(), hashlib.sha256).hexdigest()


class _Issuer:
    """One issuer of tokens and its rotating keys."""

    def __init__(self, config: JwtIssuer) -> None:
        self._config = config
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched = float("-inf")
        self._lock = asyncio.Lock()

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
        if not isinstance(customer, str) or not _CUSTOMER_ID.match(customer):
            raise refusal
        return Customer(customer, config.issuer)

    async def _key(self, key_id: str) -> jwt.PyJWK | None:
        """A key by its id; an unknown id makes us look for rotated keys, but not more often than allowed."""
        age = time.monotonic() - self._fetched
        if age > self._config.refresh_seconds or (key_id not in self._keys and age > self._config.lookup_seconds):
            async with self._lock:
                if time.monotonic() - self._fetched >= age:
                    await self._fetch()
        return self._keys.get(key_id)

    async def _fetch(self) -> None:
        try:
            if self._config.jwks.startswith(("http://", "https://")):
                async with httpx.AsyncClient(timeout=5.0) as client:
                    document = await fetch_json(client, "GET", self._config.jwks)
            else:
                with open(self._config.jwks, encoding="utf-8") as file:  # noqa: ASYNC230
                    document = json.load(file)
            keys = jwt.PyJWKSet.from_dict(document).keys
        except (httpx.HTTPError, OSError, ValueError, jwt.PyJWTError) as error:
            if not self._keys:
                raise UnavailableError(f"The keys of {self._config.issuer} cannot be read; try again later") from error
            log.warning("keys of an issuer cannot be read, the known ones stay: %s", error)
            self._fetched = time.monotonic()
            return
        self._keys = {key.key_id: key for key in keys if key.key_id and key.key_type != "oct"}
        self._fetched = time.monotonic()
