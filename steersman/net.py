"""Requests to addresses that a configuration or a document names, without becoming a door into the own network.

    async with guarded_client(timeout=5) as client:
        await client.get(url)

Every connection, redirects included, goes to an address that was looked at first: link-local ones and the metadata
services of clouds, multicast and unspecified ones are refused, unless the allow-list names them. With
`public_only` so are private and loopback ones: for URLs that come from outside rather than from the operator. The
checked address is the one that is connected to, so a name cannot change its meaning in between.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from steersman.errors import PermissionDeniedError

ALLOW_VARIABLE = "STEERSMAN_ALLOWED_HOSTS"
"""Names, addresses and networks that are always allowed, separated by commas."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Beside link-local 169.254.169.254, where AWS, Azure and Google answer: Alibaba, AWS over IPv6, Oracle.
_METADATA = frozenset(
    ipaddress.ip_address(address) for address in ("100.100.100.200", "fd00:ec2::254", "192.0.0.192", "168.63.129.16")
)


def refusal(address: str, *, public_only: bool = False) -> str | None:
    """Why an IP address must not be connected to; None: it may."""
    ip: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    if ip in _METADATA:
        return "a metadata service"
    if ip.is_link_local:
        return "link-local"
    if ip.is_multicast:
        return "multicast"
    if ip.is_unspecified:
        return "unspecified"
    if public_only and not ip.is_global:
        return "not public"
    return None


class Guard(httpx.AsyncBaseTransport):
    """Looks at every address before it connects."""

    def __init__(self, inner: httpx.AsyncBaseTransport, allow: Iterable[str], public_only: bool) -> None:
        self._inner = inner
        self._allow = list(allow)
        self._public_only = public_only

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host, url = request.url.host, request.url
        addresses = await self._checked(host, url.port or (443 if url.scheme == "https" else 80))
        # The name stays in the Host header and in TLS; only the way there is fixed.
        request.extensions = {**request.extensions, "sni_hostname": host}
        for last, address in ((address == addresses[-1], address) for address in addresses):
            request.url = url.copy_with(host=address)
            try:
                response = await self._inner.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if last:
                    raise
            else:
                request.url = url  # Redirects are relative to the name.
                return response
        raise AssertionError("a name has an address")

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _checked(self, host: str, port: int) -> list[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise httpx.ConnectError(f"the name {host} cannot be resolved") from None
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            reason = refusal(address, public_only=self._public_only)
            if reason is not None and not _allowed(host, address, self._allow):
                raise PermissionDeniedError(
                    f"{host} is {address}, which is {reason}: not connected to; if that is meant, name it in"
                    f" {ALLOW_VARIABLE}"
                )
        return list(dict.fromkeys(addresses))


def guarded_client(*, public_only: bool = False, allow: Sequence[str] = (), **options: Any) -> httpx.AsyncClient:
    """An HTTP client that looks at every address before it connects; it takes no proxy from the environment."""
    allow = [*allow, *(name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",") if name.strip())]
    transport = options.pop("transport", None) or httpx.AsyncHTTPTransport(verify=options.pop("verify", True))
    return httpx.AsyncClient(transport=Guard(transport, allow, public_only), trust_env=False, **options)


_SECRETS = re.compile(r"(?<=://)[^/?#@\s]*:[^/?#@\s]*@|(?<=://)[^/?#@\s]*@")


def shown(text: str) -> str:
    """A URL, or a sentence with URLs in it, without user names, passwords and query values."""
    text = _SECRETS.sub("***@", text)
    if not any(c.isspace() for c in text) and "://" in text:
        parts = urlsplit(text)
        query = "&".join(f"{pair.partition('=')[0]}=***" for pair in parts.query.split("&")) if parts.query else ""
        return urlunsplit(parts._replace(query=query))
    return re.sub(r"(://\S*?\?)\S*", r"\1***", text)


def _allowed(host: str, address: str, allow: Sequence[str]) -> bool:
    for entry in allow:
        if entry.lower() == host.lower():
            return True
        try:
            if ipaddress.ip_address(address.partition("%")[0]) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False
