"""What happens around every HTTP request: request id, size and time limits, errors that nothing else caught.

It lies around the whole application and calls the busiest routes itself: matching, dependencies and inner middlewares
of the framework would cost those more than the gateway's own work.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import sqlalchemy as sa
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.config import Limits
from services.gateway.errors import (
    LargeHeadersError,
    LongPathError,
    SlowRequestError,
    TooLargeError,
    UnsupportedMediaTypeError,
    error_response,
)
from services.gateway.metrics import Metrics
from steersman.errors import CancelledError, InternalError, SteersmanError, UnavailableError

log = logging.getLogger("steersman.gateway")

_HEADER_BYTES = 32_768
_PATH_BYTES = 8192
_LOGGED_PATH = 200
_REQUEST_ID = re.compile(rb"^[A-Za-z0-9._:-]{1,128}$")

_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    # Pages bring their own script and style files; nothing inline, nothing from elsewhere.
    (
        b"content-security-policy",
        b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    ),
)

Endpoint = Callable[[Request], Awaitable[Response]]


class FrontMiddleware:
    """Outermost layer of the application."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, posts: Mapping[str, Endpoint]) -> None:
        """`posts` are the endpoints of POST routes, by path, that are called without the framework."""
        self._app = app
        self._posts = posts
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        endpoint: Endpoint | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), *_SECURITY_HEADERS]
            await send(message)

        start = time.perf_counter()
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > _HEADER_BYTES:
                raise LargeHeadersError(f"The headers are larger than {_HEADER_BYTES} bytes; send less")
            if len(scope["raw_path"]) + len(scope["query_string"]) > _PATH_BYTES:
                raise LongPathError(f"The path is longer than {_PATH_BYTES} bytes; shorten it")
            if any(n == b"content-encoding" and v.lower() != b"identity" for n, v in scope["headers"]):
                raise UnsupportedMediaTypeError("Bodies are taken unpacked; leave content-encoding out")
            limited = _LimitedBody(scope, receive, self._limits)
            endpoint = self._posts.get(scope["path"]) if scope["method"] == "POST" else None
            if endpoint is None:
                await self._app(scope, limited, send_with_headers)
            else:
                response = await endpoint(Request(scope, limited))
                await response(scope, limited, send_with_headers)
        except (ClientDisconnect, CancelledError):
            status = status or CancelledError.http_status
        except Exception as error:
            if isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError)):
                log.exception("the database failed", extra={"request_id": request_id})
                error = UnavailableError("The gateway's database cannot be reached; try again later")
            elif not isinstance(error, SteersmanError):
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
            route = scope["path"] if endpoint else getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            return value.decode()
    return f"req-{secrets.token_hex(12)}"


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
