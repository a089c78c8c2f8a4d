"""A secret that the callers of a server must show: drawn for each run, so that no other run reaches its services.

It travels in the metadata `authorization: Bearer ...`, reaches processes by environment (never by arguments, which
everybody on a machine can read), and is compared in constant time.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import grpc

from steersman.environment import header_secret_in
from steersman.errors import UnauthenticatedError

RUN_TOKEN = "STEERSMAN_RUN_TOKEN"
"""Environment variable with the token of a run, for its services and its stages."""


def read_token(variable: str | None, field: str) -> str | None:
    """The token in an environment variable; None for no variable. Raises ConfigError when it is not set."""
    if variable is None:
        return None
    return header_secret_in(variable, field)


def is_open(method: str) -> bool:
    """Whether a method wants no token: health and reflection tell nothing, and probes have none."""
    return method.startswith("/grpc.")


class TokenCheck(grpc.aio.ServerInterceptor):
    """Refuses calls without the token before their message is read."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        shown = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        if handler is None or is_open(handler_call_details.method):
            return handler
        if hmac.compare_digest(str(shown).encode(), self._expected):
            return handler
        return _refusal(handler)


def _refusal(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """A handler of the same kind that raises; the outer interceptor turns it into a status."""
    problem = "this service belongs to a run and wants its token; take the one of your own run"

    async def refuse(request: Any, context: Any) -> Any:
        raise UnauthenticatedError(problem)

    async def refuse_stream(request: Any, context: Any) -> Any:
        raise UnauthenticatedError(problem)
        yield

    parts = (handler.request_deserializer, handler.response_serializer)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(refuse_stream, *parts)
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(refuse, *parts)
    if handler.stream_stream:
        return grpc.stream_stream_rpc_method_handler(refuse_stream, *parts)
    return grpc.unary_unary_rpc_method_handler(refuse, *parts)


class _Details(NamedTuple):
    """The client's side of a call, as interceptors may change it."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any = None


def _with_token(details: Any, token: str) -> Any:
    metadata = [*(details.metadata or ()), ("authorization", f"Bearer {token}")]
    return _Details(
        details.method,
        details.timeout,
        metadata,
        details.credentials,
        details.wait_for_ready,
        getattr(details, "compression", None),
    )


class BlockingToken(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor
):
    """Shows the token on a blocking channel."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_with_token(details, self._token), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_with_token(details, self._token), request)

    def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(_with_token(details, self._token), requests)


class _AioUnary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(_aio_details(details, self._token), request)


class _AioUpload(grpc.aio.StreamUnaryClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_stream_unary(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await continuation(_aio_details(details, self._token), requests)


class _AioStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(_aio_details(details, self._token), request)


def _aio_details(details: Any, token: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add("authorization", f"Bearer {token}")
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


def aio_interceptors(token: str) -> list[grpc.aio.ClientInterceptor]:
    """Show the token on a channel of asyncio."""
    return [_AioUnary(token), _AioStream(token), _AioUpload(token)]
