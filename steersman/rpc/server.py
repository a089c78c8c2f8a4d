"""What every gRPC server of Steersman shares: health, reflection, errors, TLS, drain.

grpc.health.v1 answers from the first moment and says SERVING only after `Server.ready()`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from pydantic import Field

from steersman import loading
from steersman.config.base import FrozenModel
from steersman.config.tls import Tls
from steersman.errors import ERROR_DOMAIN, ConfigError, RateLimitedError, SteersmanError
from steersman.home import cache_folder
from steersman.rpc.bounds import check_request
from steersman.rpc.metrics import serve_metrics, track
from steersman.rpc.sealed import CHECKSUM, Arrived, Unreadable, checked, damaged
from steersman.rpc.tls import server_credentials
from steersman.rpc.token import TokenCheck, read_token
from steersman.rpc.wire import REQUEST_BYTES

log = logging.getLogger("steersman.rpc")

ANSWER_BYTES = 64 * 1024 * 1024
"""Largest message that a caller takes: of an answer at once, the alternatives of every token."""


class ServerConfig(FrozenModel):
    host: str = "127.0.0.1"
    """Address to listen on; in a pod `0.0.0.0`, or `::` for IPv6 (and IPv4 where the machine has both)."""
    cache_dir: Path = cache_folder()
    """Where models that are not folders yet are kept."""
    tls: Tls | None = None
    """None: plain text, for one machine or behind a mesh."""
    token_env: str | None = None
    """Environment variable with a token that callers must show; None: none is asked for."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Prometheus metrics; None: none."""
    drain_seconds: float = 30.0
    """How long running calls may still take after SIGTERM."""
    max_message_bytes: int = REQUEST_BYTES
    """Larger requests are refused with RESOURCE_EXHAUSTED."""
    max_concurrent_calls: Annotated[int, Field(gt=0)] = 1024
    """Calls of a listener at the same time; the next is refused with RESOURCE_EXHAUSTED."""


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Options that servers and clients must agree on; `max_message_bytes`: largest message that this side takes."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", ANSWER_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Servers take more frequent pings for abuse; without this they want 5 minutes between them.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def address_of(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def to_status(error: SteersmanError) -> grpc.Status:
    """The rich gRPC status of an error: code, sentence, an ErrorInfo with the details, and when to try again."""
    info = error_details_pb2.ErrorInfo(
        reason=type(error).__name__,
        domain=ERROR_DOMAIN,
        metadata={key: str(value) for key, value in error.details.items()},
    )
    status = status_pb2.Status(code=grpc.StatusCode[error.grpc_code].value[0], message=error.message)
    status.details.add().Pack(info)
    if isinstance(error, RateLimitedError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromTimedelta(timedelta(seconds=error.retry_after))
        status.details.add().Pack(retry)
    return rpc_status.to_status(status)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns errors of the tree into their status; everything else into INTERNAL without a stack trace.

    It also bounds the calls that run at the same time. Health and reflection are not counted: a busy server lives.
    """

    def __init__(self, most_calls: int = 1024) -> None:
        self._most_calls = most_calls
        self._running = 0

    @contextmanager
    def _counted(self, method: str) -> Iterator[None]:
        if self._running >= self._most_calls:
            raise RateLimitedError(f"{self._running} calls run already; try again in a second")
        self._running += 1
        try:
            with track(method):
                yield
        finally:
            self._running -= 1

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith("/grpc."):
            return handler
        method = handler_call_details.method

        async def abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
            if isinstance(error, SteersmanError):
                status = to_status(error)
                await context.abort(status.code, status.details, status.trailing_metadata)
            log.exception("%s failed", method, exc_info=error)
            await context.abort(grpc.StatusCode.INTERNAL, f"{method}: internal error; the server's log has the cause")

        @asynccontextmanager
        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                request = await _readable(method, request, context)
                with self._counted(method):
                    yield request
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception as error:
                await abort(context, error)

        def unary(function: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
                async with guarded(request, context) as readable:
                    return await function(readable, context)

            return call

        def stream(function: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
                async with guarded(request, context) as readable:
                    async for response in function(readable, context):
                        yield response

            return call

        read, write = checked(method, handler.request_deserializer), handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(unary(handler.unary_unary), read, write)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(stream(handler.unary_stream), read, write)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(unary(handler.stream_unary), read, write)
        return handler


async def _readable(method: str, request: Any, context: grpc.aio.ServicerContext) -> Any:
    """The request, or each of a stream of them; raises what is wrong with one that could not be read, that is beyond
    the contract's bounds, or that is not the one whose checksum came with the call."""
    if isinstance(request, AsyncIterator):
        return _each_readable(request)
    found = request.checksum if isinstance(request, Arrived) else None
    wanted = next((value for key, value in context.invocation_metadata() or () if key == CHECKSUM), found)
    if wanted != found:
        raise damaged(method)
    return await _opened(request)


async def _each_readable(requests: AsyncIterator[Arrived | Unreadable]) -> AsyncIterator[Any]:
    async for request in requests:
        yield await _opened(request)


async def _opened(request: Arrived | Unreadable) -> Any:
    if isinstance(request, Unreadable):
        raise request.error
    await check_request(request.request, request.size)
    return request.request


Service = tuple[Callable[[Any, grpc.aio.Server], None], Any, str]
"""Registration function, servicer, full name."""


class Server:
    """One or more listeners with health and reflection, and an orderly end.

    `run` is the life of a service; tests call its steps one by one.
    """

    def __init__(
        self,
        config: ServerConfig,
        listeners: Sequence[tuple[int, Sequence[Service]]],
        on_drain: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Args:
        config: address, TLS, limits.
        listeners: ports (0: any free one) and the services that each offers.
        on_drain: runs after the last call has ended.
        """
        self._config = config
        self._on_drain = on_drain
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self._servers: list[grpc.aio.Server] = []
        self.ports: list[int] = []
        token = read_token(config.token_env, "tokenEnv")
        for port, services in listeners:
            server = grpc.aio.server(
                interceptors=[ErrorInterceptor(config.max_concurrent_calls), *([TokenCheck(token)] if token else [])],
                options=[
                    *channel_options(config.max_message_bytes),
                    ("grpc.so_reuseport", 0),
                    # Only identity: the limit of a message is looked at after it was unpacked.
                    ("grpc.compression_enabled_algorithms_bitset", 1),
                ],
            )
            names = [name for _, _, name in services]
            for register, servicer, _ in services:
                register(servicer, server)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
            self._names.extend(names)
            self._servers.append(server)
            self.ports.append(self._bind(server, port))

    def _bind(self, server: grpc.aio.Server, port: int) -> int:
        address = address_of(self._config.host, port)
        try:
            if self._config.tls is None:
                return int(server.add_insecure_port(address))
            return int(server.add_secure_port(address, server_credentials(self._config.tls)))
        except RuntimeError:
            raise ConfigError(f"{address} cannot be listened on; is it in use? choose another port") from None

    async def start(self) -> None:
        """Listens; health says NOT_SERVING."""
        await self.set_serving(False)
        for server in self._servers:
            await server.start()

    async def ready(self) -> None:
        """Health says SERVING from now on."""
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """What health says of every service; for servers whose readiness comes and goes."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def run(self, load: Callable[[], Awaitable[Any]] | None = None) -> None:
        """Listens, loads (health: NOT_SERVING meanwhile), serves until SIGTERM or SIGINT, drains."""
        if self._config.metrics_port is not None:
            serve_metrics(self._config.host, self._config.metrics_port)
        await self.start()
        if load is not None:
            await load()
        loading.done()
        await self.ready()
        log.info("serving on %s", ", ".join(address_of(self._config.host, port) for port in self.ports))
        await self.run_until_signal()

    async def run_until_signal(self) -> None:
        """Waits for SIGTERM or SIGINT, then drains."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        await self.drain()

    async def drain(self) -> None:
        """Refuses new calls, lets running ones end within `drain_seconds`, then closes."""
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(*(server.stop(self._config.drain_seconds) for server in self._servers))
        if self._on_drain is not None:
            await self._on_drain()
