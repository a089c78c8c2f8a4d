"""What happens around every HTTP request: request id, size and time limits, errors that nothing else caught.

It lies around the whole application and calls the busiest routes itself: matching, dependencies and inner middlewares
of the framework would cost those more than the gateway's own work.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.auth.origin import address_of, begin_visit, once
from services.gateway.bodies import check_structure, request_id_of
from services.gateway.config import Cors, GatewayConfig, Limits
from services.gateway.errors import (
    BadRequestError,
    LargeHeadersError,
    LongPathError,
    SlowRequestError,
    TooLargeError,
    UnsupportedMediaTypeError,
    error_response,
)
from services.gateway.metrics import Metrics
from services.gateway.refusals import Refusals
from steersman.errors import CancelledError, InternalError, SteersmanError, UnavailableError

log = logging.getLogger("steersman.gateway")

_HEADER_BYTES = 32_768
_PATH_BYTES = 8192
_LOGGED_PATH = 200
_OF_SDK = "/v2/"
"""Where KServe's SDK reads the bodies."""
_JSON_LENGTH = b"inference-header-content-length"

# Pages bring their own script and style files; nothing inline, nothing from elsewhere.
PAGE_POLICY = "default-src 'self'; object-src 'none'; frame-ancestors {}; base-uri 'none'; form-action 'self'"
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
    (b"content-security-policy", PAGE_POLICY.format("'none'").encode()),
)

Endpoint = Callable[[Request], Awaitable[Response]]


def across_origins(app: ASGIApp, cors: Cors | None) -> ASGIApp:
    """The application for pages of other origins, too. Cookies are never taken from them: they bring a key."""
    if cors is None:
        return app
    return CORSMiddleware(
        app,
        allow_origins=cors.origins,
        allow_methods=["GET", "POST", "PATCH", "DELETE"],
        allow_headers=["*"],
        allow_credentials=False,
        expose_headers=["x-request-id", "retry-after"],
        max_age=cors.max_age_seconds,
    )


class FrontMiddleware:
    """Outermost layer of the application."""

    def __init__(
        self,
        app: ASGIApp,
        config: GatewayConfig,
        metrics: Metrics,
        refusals: Refusals,
        posts: Mapping[str, Endpoint],
    ) -> None:
        """`posts` are the endpoints of POST routes, by path, that are called without the framework."""
        self._app = app
        self._posts = posts
        self._limits = config.limits
        self._metrics = metrics
        self._refusals = refusals
        self._proxies = config.trusted_proxies
        self._hosts = config.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        endpoint: Endpoint | None = None
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        forwarded = [value for name, value in headers if name == "x-forwarded-for"] if self._proxies else []
        peer = scope["client"][0] if scope.get("client") else ""
        visit = begin_visit(address_of(peer, forwarded, self._proxies))

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name.lower() for name, _ in message["headers"]}  # a page that may stand elsewhere says so itself
                usual = [header for header in _SECURITY_HEADERS if header[0] not in own]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), *usual]
            await send(message)

        start = time.perf_counter()
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > _HEADER_BYTES:
                raise LargeHeadersError(f"The headers are larger than {_HEADER_BYTES} bytes; send less")
            if len(scope["raw_path"]) + len(scope["query_string"]) > _PATH_BYTES:
                raise LongPathError(f"The path is longer than {_PATH_BYTES} bytes; shorten it")
            if any(n == b"content-encoding" and v.lower() != b"identity" for n, v in scope["headers"]):
                raise UnsupportedMediaTypeError("Bodies are taken unpacked; leave content-encoding out")
            once(headers)
            _check_host(headers, self._hosts)
            limited = _LimitedBody(scope, receive, self._limits)
            endpoint = self._posts.get(scope["path"]) if scope["method"] == "POST" else None
            if endpoint is None:
                inner: Receive = limited
                if scope["method"] == "POST" and scope["path"].startswith(_OF_SDK):
                    inner = await _checked(scope, limited)
                await self._app(scope, inner, send_with_headers)
            else:
                response = await endpoint(Request(scope, limited))
                await response(scope, limited, send_with_headers)
        except (ClientDisconnect, CancelledError):
            status = status or CancelledError.http_status
        except asyncio.CancelledError:
            # The time of the drain is over. The listener would answer 500, without a reason.
            if not status:
                ending = UnavailableError("The gateway is ending; ask again")
                await error_response(ending, path=scope["path"])(scope, receive, send_with_headers)
            raise
        except Exception as error:
            if not isinstance(error, SteersmanError):
                log.exception("request failed", extra={"request_id": request_id})
                error = InternalError(f"An internal error; the gateway's log has the cause under {request_id}")
            if status:
                raise error from None
            await error_response(error, path=scope["path"])(scope, receive, send_with_headers)
        finally:
            record: dict[str, Any] = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:_LOGGED_PATH],
                "status": status,
                "milliseconds": round((time.perf_counter() - start) * 1000, 1),
            }
            log.info("request", extra=record)
            self._refusals.note(visit, status, scope["path"], request_id)
            route = scope["path"] if endpoint else getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()


async def _checked(scope: Scope, receive: Receive) -> Receive:
    """Reads a body that a library parses, refuses JSON of very many values, and hands it on."""
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)
    # With tensors in binary only the beginning is JSON.
    length = next((value for name, value in scope["headers"] if name == _JSON_LENGTH), b"")
    check_structure(body[: int(length)] if length.isdigit() else body)
    unread = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": unread.pop(), "more_body": False} if unread else await receive()

    return replay


def _check_host(headers: Sequence[tuple[str, str]], allowed: Sequence[str] | None) -> None:
    """Raises BadRequestError for a name that is not ours."""
    named = [value for name, value in headers if name == "host"]
    if len(named) > 1:
        raise BadRequestError("host was sent twice; send it once", param="host")
    if allowed is None or not named:
        return
    host = urlsplit(f"//{named[0]}").hostname or ""
    # A name without a dot is no page's elsewhere.
    good = "." not in host or any(
        host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in allowed
    )
    if not good and not _is_address(host):
        raise BadRequestError(f"This gateway is not called {host[:100]!r}; allowedHosts names what it is called")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return request_id_of({"x-request-id": given.decode("latin-1")})


class _LimitedBody:
    """Receives a body within its limits; after it, passes on."""

    def __init__(self, scope: Scope, receive: Receive, limits: Limits) -> None:
        self._receive = receive
        self._limits = limits
        self._left = limits.body_bytes
        self._complete = False
        self._deadline = time.monotonic() + limits.body_seconds
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > limits.body_bytes:
                raise self._too_large()

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise SlowRequestError(
                f"The body did not arrive within {self._limits.body_seconds:g} s; send it faster"
            ) from None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise self._too_large()
            self._complete = not message.get("more_body", False)
        return message

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"The body is larger than {self._limits.body_bytes} bytes; send less")
