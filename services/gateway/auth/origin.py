"""Where the request at hand comes from, and what outsiders may try how often.

The address of a request is that of its connection. Behind `trustedProxies` proxies it is the one that the outermost of
them saw (`x-forwarded-for`); what a client writes into that header itself is never believed.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from urllib.parse import unquote

from services.gateway.auth.callers import Caller
from services.gateway.errors import BadRequestError
from steersman.errors import RateLimitedError

_MOST_ADDRESSES = 10_000
_ONCE = ("authorization", "x-customer-token", "x-customer", "x-customer-signature", "idempotency-key", "x-consent")


@dataclass(slots=True)
class Visit:
    """One request, as far as it is known."""

    address: str = ""
    """An IPv4 address, or the /64 network of an IPv6 one; whatever else names the other end."""
    caller: Caller | None = None


_visit: ContextVar[Visit] = ContextVar("visit")


def begin_visit(address: str) -> Visit:
    """Remembers where the request of this task comes from."""
    visit = Visit(_household(address))
    _visit.set(visit)
    return visit


def _household(address: str) -> str:
    """What one subscriber has: an IPv4 address, or a network /64 of IPv6, where he may take any address he likes."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


def current_visit() -> Visit:
    return _visit.get(Visit())


def address_of(peer: str, forwarded: Sequence[str], trusted_proxies: int) -> str:
    """The address that counts.

    Args:
        peer: Of the connection.
        forwarded: Values of `x-forwarded-for`, in the order of the headers.
        trusted_proxies: How many of our own proxies add to that header.
    """
    hops = [hop.strip() for value in forwarded for hop in value.split(",")]
    if trusted_proxies and len(hops) >= trusted_proxies:
        return hops[-trusted_proxies][:64]
    return peer


def peer_address(peer: str) -> str:
    """The address in what gRPC calls a peer: `ipv4:127.0.0.1:4711`, `ipv6:%5B::1%5D:4711`."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer[:64]


def once(headers: Sequence[tuple[str, str]]) -> None:
    """Raises BadRequestError when a header that decides something came twice: readers would choose differently."""
    seen: set[str] = set()
    for name, _ in headers:
        if name in _ONCE:
            if name in seen:
                raise BadRequestError(f"{name} was sent twice; send it once", param=name)
            seen.add(name)


def headers_of(metadata: Sequence[tuple[str, str | bytes]]) -> Mapping[str, str]:
    """The text metadata of a gRPC call; BadRequestError as `once`."""
    pairs = [(name, value) for name, value in metadata if isinstance(value, str)]
    once(pairs)
    return dict(pairs)


@dataclass(slots=True)
class Attempts:
    """At most so many within a minute from one address; the addresses that were quiet longest are forgotten."""

    per_minute: int
    what: str
    """As in 'Too many ... from this address'."""
    _seen: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def check(self, address: str) -> None:
        """Raises RateLimitedError while there were too many."""
        wait = (self._level(address) - self.per_minute + 1) * 60 / self.per_minute
        if wait > 0:
            seconds = max(wait, 1.0)
            raise RateLimitedError(
                f"Too many {self.what} from this address; try again in {seconds:.0f} s", retry_after=seconds
            )

    def count(self, address: str) -> None:
        level = self._level(address) + 1
        self._seen[address] = (level, time.monotonic())
        self._seen.move_to_end(address)
        if len(self._seen) > _MOST_ADDRESSES:
            self._seen.popitem(last=False)

    def _level(self, address: str) -> float:
        level, moment = self._seen.get(address, (0.0, 0.0))
        return max(0.0, level - (time.monotonic() - moment) * self.per_minute / 60)
