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
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from steersman.errors import (
    ConfigError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    UnavailableError,
    without_credentials,
)

if TYPE_CHECKING:
    import httpx2

ALLOW_VARIABLE = "STEERSMAN_ALLOWED_HOSTS"
"""Names, addresses and networks that are always allowed, separated by commas."""
_LONGEST_REASON = 1_000_000
_TRIES, _LONGEST_WAIT = 6, 60.0
"""Of a request to a server that is full."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Beside link-local 169.254.169.254 (AWS, Azure, Google): Alibaba, AWS and Google over IPv6, Oracle, Azure.
_METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in ("100.100.100.200", "fd00:ec2::254", "fd20:ce::254", "192.0.0.192", "168.63.129.16")
)
_EMBEDDING = tuple(ipaddress.IPv6Network(network) for network in ("64:ff9b::/96", "::/96"))
"""Whose last 32 bits are an address of IPv4: NAT64, and the old compatible form."""


def refusal(address: str, *, public_only: bool = False) -> str | None:
    """Why an IP address must not be connected to; None: it may."""
    ip: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = next((ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) for net in _EMBEDDING if ip in net), None)
        teredo = ip.teredo[1] if ip.teredo else None
        # Of ::/96 the smallest are addresses of IPv6 itself, :: and ::1.
        ip = ip.ipv4_mapped or ip.sixtofour or teredo or (embedded if int(ip) > 0xFFFF else None) or ip
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


class Guard(httpx.AsyncBaseTransport, httpx.BaseTransport):
    """Looks at every address before it connects; around a transport of httpx, of either kind, or of one like it."""

    def __init__(
        self,
        inner: Any,
        *,
        public_only: bool = False,
        allow: Sequence[str] = (),
        unreachable: tuple[type[Exception], ...] = (httpx.ConnectError, httpx.ConnectTimeout),
    ) -> None:
        """`unreachable`: what `inner` raises when nobody answers at an address; then the name's next one is tried."""
        self._inner = inner
        self._public_only = public_only
        named = (name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(","))
        self._allow = [*allow, *(name for name in named if name)]
        self._unreachable = unreachable

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url, loop = request.url, asyncio.get_running_loop()
        found = await self._resolved(loop.run_in_executor(None, _resolve, url.host, _port(url)))
        for address in self._checked(url.host, found):
            _direct(request, url, address)
            try:
                answer: httpx.Response = await self._inner.handle_async_request(request)
                return answer
            except self._unreachable:
                if address == found[-1]:
                    raise
            finally:
                request.url = url  # Redirects are relative to the name.
        raise AssertionError("a name has an address")

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        try:
            found = _resolve(url.host, _port(url))
        except (OSError, UnicodeError):
            raise self._unreachable[0](f"the name {url.host} cannot be resolved") from None
        for address in self._checked(url.host, found):
            _direct(request, url, address)
            try:
                answer: httpx.Response = self._inner.handle_request(request)
                return answer
            except self._unreachable:
                if address == found[-1]:
                    raise
            finally:
                request.url = url
        raise AssertionError("a name has an address")

    async def aclose(self) -> None:
        await self._inner.aclose()

    def close(self) -> None:
        self._inner.close()

    async def _resolved(self, work: Awaitable[list[str]]) -> list[str]:
        try:
            return await work
        except (OSError, UnicodeError):
            raise self._unreachable[0]("the name cannot be resolved") from None

    def _checked(self, host: str, addresses: list[str]) -> list[str]:
        for address in addresses:
            reason = refusal(address, public_only=self._public_only)
            if reason is not None and not _allowed(host, address, self._allow):
                raise PermissionDeniedError(
                    f"{host} is {address}, which is {reason}: not connected to; if that is meant, name it in"
                    f" {ALLOW_VARIABLE}"
                )
        return addresses


def guarded_client(*, public_only: bool = False, allow: Sequence[str] = (), **options: Any) -> httpx.AsyncClient:
    """An HTTP client that looks at every address before it connects; it takes no proxy from the environment."""
    inner = options.pop("transport", None) or httpx.AsyncHTTPTransport()
    return httpx.AsyncClient(transport=Guard(inner, public_only=public_only, allow=allow), trust_env=False, **options)


def guarded_sync_client(*, public_only: bool = False, allow: Sequence[str] = (), **options: Any) -> httpx.Client:
    """The same for threads. Raises ConfigError where `base_url` is no URL."""
    inner = options.pop("transport", None) or httpx.HTTPTransport()
    try:
        return httpx.Client(transport=Guard(inner, public_only=public_only, allow=allow), trust_env=False, **options)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{options.get('base_url')} is no URL ({error}); give one as https://host/v1") from None


_Answer = TypeVar("_Answer")


def patiently(ask: Callable[[], _Answer], away: int = 2) -> _Answer:
    """Asks again when the server is full, after the time that it names, and `away` times more when it is not there."""
    gone = 0
    for _ in range(1, _TRIES):
        try:
            return ask()
        except RateLimitedError as error:
            wait = error.retry_after
        except UnavailableError:
            gone += 1
            if gone > away:
                raise
            wait = 0.5 * 2.0**gone
        time.sleep(min(wait, _LONGEST_WAIT))
    return ask()


@contextmanager
def fetched(url: str, *, seconds: float = 60.0) -> Iterator[Iterator[bytes]]:
    """The pieces of what an HTTP(S) URL gives, as they are sent, from front to back.

    Raises:
        NotFoundError: there is nothing there (404).
        PermissionDeniedError: the address, or one that it redirects to, must not be connected to.
        UnavailableError: the server does not give it, or breaks off.
    """
    name = without_credentials(url)
    asked = {"accept-encoding": "identity"}
    try:
        with (
            guarded_sync_client(follow_redirects=True, timeout=seconds) as client,
            client.stream("GET", url, headers=asked) as answer,
        ):
            if answer.status_code == 404:
                raise NotFoundError(f"{name}: not found (404); check the address")
            if not answer.is_success:
                raise UnavailableError(f"{name}: refused with status {answer.status_code}; check address and access")
            yield answer.iter_raw()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnavailableError(f"{name}: {error or type(error).__name__}; check address and access") from error


def guard_hub() -> None:
    """Makes the asynchronous clients of `huggingface_hub` in this process look at every address, too."""
    from huggingface_hub import set_async_client_factory

    async def with_reason(response: httpx2.Response) -> None:
        """The library makes its errors of what a refusal says."""
        length = response.headers.get("content-length", "")
        if response.status_code >= 400 and length.isdigit() and int(length) < _LONGEST_REASON:
            await response.aread()

    set_async_client_factory(lambda: guarded_client2(timeout=None, event_hooks={"response": [with_reason]}))


def guarded_client2(**options: Any) -> httpx2.AsyncClient:
    """`guarded_client` for libraries that speak through httpx2."""
    import httpx2

    inner = httpx2.AsyncHTTPTransport()
    guard: Any = Guard(inner, unreachable=(httpx2.ConnectError, httpx2.ConnectTimeout))
    return httpx2.AsyncClient(transport=guard, trust_env=False, **options)


def _port(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def _resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, each once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _direct(request: httpx.Request, url: httpx.URL, address: str) -> None:
    """Sends a request to an address; the name stays in the Host header and in TLS."""
    request.extensions = {**request.extensions, "sni_hostname": url.host}
    request.url = url.copy_with(host=address)


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
