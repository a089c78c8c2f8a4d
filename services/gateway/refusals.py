"""Audit lines for what was refused: 401, 403, 404 and 429, gathered for some seconds so that a flood is one line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from services.gateway.auth.callers import Caller
from services.gateway.auth.origin import Visit, begin_visit, headers_of, peer_address
from services.gateway.bodies import request_id_of
from services.gateway.recorder import Record, Recorder, audit_row
from services.gateway.redaction import redact
from steersman.errors import (
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    SteersmanError,
    UnauthenticatedError,
    UnavailableError,
)
from steersman.store.secret import pseudonym

_SECONDS = 5.0
_MOST_LINES = 1000
"""Of one gathering; the rest is one line together."""
_MOST_PATHS = 5
_LONGEST_PATH = 200
_OUTCOMES: dict[int, type[SteersmanError]] = {
    error.http_status: error for error in (UnauthenticatedError, PermissionDeniedError, NotFoundError, RateLimitedError)
}
_NOBODY = Caller("", "", frozenset())


@dataclass(slots=True)
class _Line:
    request_id: str
    count: int = 0
    paths: list[str] = field(default_factory=list)


class Refusals:
    def __init__(self, recorder: Recorder, secret: bytes) -> None:
        self._recorder = recorder
        self._secret = secret
        self._lines: dict[tuple[Caller, str, str], _Line] = {}

    def note(self, visit: Visit, status: int, path: str, request_id: str) -> None:
        """Remembers a request that was answered with this status."""
        error = _OUTCOMES.get(status)
        if error is None:
            return
        key = (visit.caller or _NOBODY, error.__name__, visit.address)
        if key not in self._lines and len(self._lines) >= _MOST_LINES:
            key = (_NOBODY, error.__name__, "")
        line = self._lines.setdefault(key, _Line(request_id))
        line.count += 1
        path = redact(path[:_LONGEST_PATH])
        if len(line.paths) < _MOST_PATHS and path not in line.paths:
            line.paths.append(path)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS)
            self.flush()

    def flush(self) -> None:
        """Hands what was gathered to the recorder; what it does not take stays for the next time."""
        for key, line in list(self._lines.items()):
            caller, outcome, address = key
            origin = pseudonym(self._secret, "address", address) if address else ""
            records = [{"count": line.count, "paths": line.paths}]
            row = audit_row(caller, line.request_id, "refused", outcome, records=records, origin=origin)
            try:
                self._recorder.put(Record(row))
            except UnavailableError:
                return
            del self._lines[key]


@contextmanager
def noted(refusals: Refusals, context: Any, method: str) -> Iterator[Mapping[str, str]]:
    """The text metadata of a gRPC call; what is refused in the block leaves an audit line.

    Args:
        context: of the servicer's method.
        method: `package.Service/Method`.
    """
    visit = begin_visit(peer_address(context.peer()))
    metadata = context.invocation_metadata() or ()
    try:
        yield headers_of(metadata)
    except SteersmanError as error:
        request_id = request_id_of({name: value for name, value in metadata if isinstance(value, str)})
        refusals.note(visit, error.http_status, method, request_id)
        raise
