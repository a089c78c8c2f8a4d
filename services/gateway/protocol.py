"""HTTP connections that cannot be held open with half a request head (uvicorn itself has no limit for that)."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.errors import LargeHeadersError, SlowRequestError, error_body
from steersman.errors import SteersmanError

_HEAD_BYTES = 1_048_576
"""More than one read of the transport, which may hold a head and a body; `FrontMiddleware` has the real limit."""
_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


def guarded_protocol(head_seconds: float) -> type[HttpToolsProtocol]:
    """A protocol that waits this long for a request's head, counted from the connection or from its first byte."""

    class Guarded(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _begun = False
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(head_seconds, self._too_slow)

        def data_received(self, data: bytes) -> None:
            if self._timer is not None:
                self._head_bytes += len(data)
                if self._head_bytes > _HEAD_BYTES:
                    self._refuse(LargeHeadersError("The headers are too large; send less"))
                    return
            super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begun, self._head_bytes = True, 0
            if self._timer is None:
                self._timer = self.loop.call_later(head_seconds, self._too_slow)

        def on_headers_complete(self) -> None:
            self._stop_timer()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._refuse(SlowRequestError(f"The headers did not arrive within {head_seconds:g} s; send them faster"))

        def _refuse(self, error: SteersmanError) -> None:
            self._stop_timer()
            # An answer that is still being sent must not get another one into it.
            if self._begun and (self.cycle is None or self.cycle.response_complete):
                body = orjson.dumps(error_body(error))
                head = f"HTTP/1.1 {error.http_status} {_REASONS[error.http_status]}\r\nconnection: close\r\n"
                head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                self.transport.write(head.encode() + body)
            self.transport.close()

    return Guarded
