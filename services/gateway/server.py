"""Runs the gateway: REST and gRPC on two ports, from the first request to an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import tempfile
from collections.abc import Awaitable

import uvicorn
from fastapi import FastAPI

from services.gateway.answering import Assistant
from services.gateway.app import create_app
from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.identity import CustomerVerifier
from services.gateway.auth.keys import KeyRing
from services.gateway.auth.tokens import FeedbackTokens, Sessions
from services.gateway.backends.models import Models
from services.gateway.chat_service import SERVICE_NAME as CHAT_SERVICE
from services.gateway.chat_service import ChatServicer
from services.gateway.config import GatewayConfig
from services.gateway.feedback import FeedbackDesk
from services.gateway.inbox.worker import Inboxes
from services.gateway.keeping import forget_old
from services.gateway.metrics import Metrics
from services.gateway.middleware import Endpoint, FrontMiddleware, across_origins
from services.gateway.oip import OipServer
from services.gateway.protocol import guarded_protocol
from services.gateway.refusals import Refusals
from services.gateway.store import open_store
from steersman.errors import ConfigError, InternalError, UnavailableError
from steersman.rpc.metrics import serve_metrics
from steersman.rpc.server import Server, ServerConfig, address_of
from steersman.rpc.tls import follow_files
from steersman.store.secret import read_secret
from steersman.v1.chat_pb2_grpc import add_ChatServiceServicer_to_server

_TICK_SECONDS = 0.25
_FORGET_SECONDS = 60.0
_LAST_WRITE_SECONDS = 10.0
"""How long the end waits for a database that is away."""

log = logging.getLogger("steersman.gateway")


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the gateway, which also has a gRPC server to stop."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


class Gateway:
    """`start()`, then `run_until_signal()` or `drain()`."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.port = 0
        self.grpc_port = 0
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        database = config.database_url
        if database is None:
            log.warning("no database is configured: judgements, feedback and projects are gone when the gateway stops")
            # A thread that a cancelled task left behind may still write while the folder goes.
            self._scratch = tempfile.TemporaryDirectory(prefix="steersman-gateway-", ignore_cleanup_errors=True)
            database = f"sqlite:///{self._scratch.name}/gateway.db"
        self.store = open_store(database)
        secret = read_secret(self.store, config.secret_file, config.secret_env)
        self.metrics = Metrics(config.model)
        self.models = Models(config, lambda model, by: self.metrics.stand_ins.labels(model, by).inc())
        self.pool = self.models.main.pool
        tokens = FeedbackTokens(secret)
        self.assistant = Assistant(config, self.models, self.store, tokens, self.metrics)
        self.feedback = FeedbackDesk(self.store, self.assistant.recorder, tokens, self.metrics, config, secret)
        self.inboxes = Inboxes(self.assistant, self.store, secret)
        keys, customers = KeyRing(self.store), CustomerVerifier(config.identity)
        self.authenticator = Authenticator(config, keys, Sessions(secret), customers, secret)
        self.background = self.assistant.background
        self.refusals = Refusals(self.assistant.recorder, secret)
        self._uvicorn: _Uvicorn | None = None
        self._oip = OipServer(self.assistant, self.authenticator, self.refusals)
        self._grpc: Server | None = None
        self._listener: socket.socket | None = None
        self._stop = asyncio.Event()

    async def start(self) -> None:
        """Listens. Readiness depends on the replicas, so a gateway may be started before them."""
        config = self.config
        await self.background.start()
        await self.models.start(self.background)
        self.background.add("recorder", self.assistant.recorder.run)
        self.background.add("leases", self.assistant.leases.run)
        await self.assistant.grounding.start(self.background)
        servicer = ChatServicer(self.assistant, self.authenticator, self.feedback, self.refusals)
        self._grpc = Server(
            ServerConfig(
                host=config.host,
                tls=config.tls,
                drain_seconds=config.drain_seconds,
                max_message_bytes=config.limits.body_bytes,
            ),
            [(config.grpc_port, [(add_ChatServiceServicer_to_server, servicer, CHAT_SERVICE), self._oip.service()])],
        )
        await self._grpc.start()
        self.grpc_port = self._grpc.ports[0]
        if config.metrics_port is not None:
            serve_metrics(config.host, config.metrics_port, self.metrics.registry)
        listener = listen(config.host, config.port, config.limits.answer_seconds)
        self.port = listener.getsockname()[1]
        app, posts = self.application()
        front = across_origins(FrontMiddleware(app, config, self.metrics, self.refusals, posts), config.cors)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                front,
                http=guarded_protocol(config.limits.body_seconds),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=int(config.drain_seconds),
                # Longer than proxies keep idle connections, so that they never send into a closing one.
                timeout_keep_alive=75,
                ssl_certfile=config.tls.cert if config.tls else None,
                ssl_keyfile=config.tls.key if config.tls else None,
                ssl_ca_certs=str(config.tls.client_ca) if config.tls and config.tls.client_ca else None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if config.tls and config.tls.client_ca else ssl.CERT_NONE,
            )
        )
        self._listener = listener
        self.background.add("http", self._serve, restart=False)
        while not self._uvicorn.started:
            if self.background.failed.is_set():
                raise ConfigError(f"{config.host}:{self.port} cannot be served; the log has the cause")
            await asyncio.sleep(0.01)
        self.background.add("health", self._follow_readiness)
        self.background.add("chores", self._do_chores)
        self.background.add("refusals", self.refusals.run)
        if self.inboxes.systems:
            self.background.add("inboxes", self.inboxes.run)
        if config.tls is not None:
            self.background.add("certificates", self._follow_certificates)
        log.info("listening", extra={"host": config.host, "port": self.port, "grpc_port": self.grpc_port})

    def application(self) -> tuple[FastAPI, dict[str, Endpoint]]:
        """All of REST, and the endpoints that `FrontMiddleware` calls directly."""
        app, posts = create_app(
            self.assistant, self.authenticator, self.feedback, self.inboxes, self.metrics, self.store
        )
        self._oip.mount(app)
        return app, posts

    async def _serve(self) -> None:
        assert self._uvicorn is not None
        assert self._listener is not None
        await self._uvicorn.serve([self._listener])
        if not self._uvicorn.should_exit:
            raise InternalError("The HTTP server ended by itself")

    async def _tickets_end(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.background.finished("inboxes"), self.config.drain_seconds)

    async def _follow_readiness(self) -> None:
        """Keeps gRPC health true to readiness."""
        assert self._grpc is not None
        was_ready: bool | None = None
        while True:
            if self.assistant.ready != was_ready:
                was_ready = self.assistant.ready
                await self._grpc.set_serving(was_ready)
            await asyncio.sleep(_TICK_SECONDS)

    async def _follow_certificates(self) -> None:
        assert self._uvicorn is not None
        assert self.config.tls is not None
        assert self._uvicorn.config.ssl is not None
        await follow_files(self._uvicorn.config.ssl, self.config.tls)

    async def _do_chores(self) -> None:
        """Forgets what has expired."""
        while True:
            try:
                await self.assistant.memory.forget_expired()
                await self.assistant.idempotency.forget_expired()
                await asyncio.to_thread(forget_old, self.store, self.config.keeping)
            except UnavailableError as error:
                log.warning("what has expired cannot be forgotten now, trying again later: %s", error)
            await asyncio.sleep(_FORGET_SECONDS)

    @property
    def url(self) -> str:
        return f"{'https' if self.config.tls else 'http'}://{address_of(self.config.host, self.port)}"

    def hear_signals(self) -> None:
        """From now on SIGTERM and SIGINT are waited with until the start is over; then they end it as they should."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)

    async def run_until_signal(self) -> None:
        """Waits for SIGTERM or SIGINT, then drains.

        Raises InternalError when the gateway ended because it could not go on.
        """
        self.hear_signals()
        waits = [asyncio.create_task(event.wait()) for event in (self._stop, self.background.failed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        try:
            async with asyncio.timeout(self.config.drain_seconds + 2 * _LAST_WRITE_SECONDS):
                await self.drain()
        except TimeoutError:
            log.error("something does not close; the gateway ends without it")
        if self.background.failed.is_set():
            raise InternalError(f"The gateway cannot go on: {'; '.join(self.background.down.values())}")

    async def drain(self) -> None:
        """Not ready any more; running streams end within `drainSeconds`; then everything closes."""
        self.assistant.draining = True
        ends: list[Awaitable[None]] = []
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
            ends.append(self.background.finished("http"))
        if self._grpc is not None:
            ends.append(self._grpc.drain())
        self.inboxes.stop()
        ends.append(self._tickets_end())
        await asyncio.gather(*ends)
        self.refusals.flush()
        await self.assistant.recorder.close(_LAST_WRITE_SECONDS)
        await self.assistant.grounding.close()
        await asyncio.to_thread(self.assistant.tracer.close)
        await self.background.close()
        await self.inboxes.close()
        await self.models.close()
        for embeddings in self.assistant.embeddings.values():
            await embeddings.close()
        self.store.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def listen(host: str, port: int, unread_seconds: float) -> socket.socket:
    """`unread_seconds`: a connection whose other end takes nothing for so long is cut by the kernel."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        both = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(f"port: {host}:{port} cannot be listened on ({error.strerror}); choose another") from None
    # Accepted connections inherit it. asyncio sets it only where it made the socket itself, and without it the kernel
    # holds an answer's body back until the head is acknowledged: 40 ms for every answer on a kept connection.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unread_seconds * 1000))
    return listener
