"""Runs the gateway: REST and gRPC on two ports, from the first request to an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import ssl
import tempfile
from collections.abc import Awaitable

import uvicorn
from sqlalchemy.exc import SQLAlchemyError

from services.gateway.answering import Assistant
from services.gateway.app import create_app
from services.gateway.auth.authenticator import Authenticator
from services.gateway.auth.identity import CustomerVerifier
from services.gateway.auth.keys import KeyRing
from services.gateway.auth.tokens import FeedbackTokens, Sessions
from services.gateway.backends.pool import build_pool
from services.gateway.chat_service import SERVICE_NAME as CHAT_SERVICE
from services.gateway.chat_service import ChatServicer
from services.gateway.config import GatewayConfig
from services.gateway.feedback import FeedbackDesk
from services.gateway.metrics import Metrics
from services.gateway.middleware import FrontMiddleware
from services.gateway.oip import OipServer
from services.gateway.protocol import guarded_protocol
from services.gateway.store import open_store
from steersman.errors import ConfigError
from steersman.rpc.metrics import serve_metrics
from steersman.rpc.server import Server, ServerConfig
from steersman.store.secret import read_secret
from steersman.v1.chat_pb2_grpc import add_ChatServiceServicer_to_server

_TICK_SECONDS = 0.25
_FORGET_EVERY = 240

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
            self._scratch = tempfile.TemporaryDirectory(prefix="steersman-gateway-")
            database = f"sqlite:///{self._scratch.name}/gateway.db"
        self.store = open_store(database)
        secret = read_secret(self.store, config.secret_file, config.secret_env)
        self.metrics = Metrics(config.model)
        self.pool = build_pool(config)
        tokens = FeedbackTokens(secret)
        self.assistant = Assistant(config, self.pool, self.store, tokens, self.metrics)
        self.feedback = FeedbackDesk(self.store, self.assistant.recorder, tokens, self.metrics)
        keys, customers = KeyRing(self.store), CustomerVerifier(config.identity)
        self.authenticator = Authenticator(config, keys, Sessions(secret), customers)
        self._uvicorn: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self._oip = OipServer(self.assistant, self.authenticator)
        self._grpc: Server | None = None
        self._chores: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens. Readiness depends on the replicas, so a gateway may be started before them."""
        config = self.config
        await self.pool.start()
        self.assistant.recorder.start()
        await self.assistant.grounding.start()
        servicer = ChatServicer(self.assistant, self.authenticator, self.feedback)
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
        listener = _listen(config.host, config.port)
        self.port = listener.getsockname()[1]
        app, posts = create_app(self.assistant, self.authenticator, self.feedback, self.metrics, self.store)
        self._oip.mount(app)
        front = FrontMiddleware(app, config.limits, self.metrics, posts)
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
        self._serving = asyncio.create_task(self._uvicorn.serve([listener]))
        while not self._uvicorn.started:
            if self._serving.done():
                await self._serving
                raise ConfigError(f"{config.host}:{self.port} cannot be served; the log has the cause")
            await asyncio.sleep(0.01)
        self._chores = asyncio.create_task(self._do_chores())
        log.info("listening", extra={"host": config.host, "port": self.port, "grpc_port": self.grpc_port})

    async def _do_chores(self) -> None:
        """Keeps gRPC health true to readiness, and forgets what has expired."""
        assert self._grpc is not None
        was_ready = False
        for tick in itertools.count():
            if self.assistant.ready != was_ready:
                was_ready = self.assistant.ready
                await self._grpc.set_serving(was_ready)
            if tick % _FORGET_EVERY == 0:
                try:
                    await self.assistant.memory.forget_expired()
                except SQLAlchemyError:
                    log.exception("expired conversations cannot be forgotten, trying again later")
            await asyncio.sleep(_TICK_SECONDS)

    @property
    def url(self) -> str:
        return f"{'https' if self.config.tls else 'http'}://{self.config.host}:{self.port}"

    async def run_until_signal(self) -> None:
        """Waits for SIGTERM or SIGINT, then drains."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        await self.drain()

    async def drain(self) -> None:
        """Not ready any more; running streams end within `drainSeconds`; then everything closes."""
        self.assistant.draining = True
        if self._chores is not None:
            self._chores.cancel()
        ends: list[Awaitable[None]] = []
        if self._uvicorn is not None and self._serving is not None:
            self._uvicorn.should_exit = True
            ends.append(self._serving)
        if self._grpc is not None:
            ends.append(self._grpc.drain())
        await asyncio.gather(*ends)
        await self.assistant.recorder.close()
        await self.assistant.grounding.close()
        await asyncio.to_thread(self.assistant.tracer.close)
        await self.pool.close()
        self.store.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"port: {host}:{port} cannot be listened on ({error.strerror}); choose another") from None
