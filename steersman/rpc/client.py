"""Channels to the services, and waiting until they are ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steersman.config.tls import ClientTls
from steersman.errors import UnavailableError
from steersman.rpc.server import ANSWER_BYTES, channel_options
from steersman.rpc.tls import FollowingChannel, channel_credentials, client_files
from steersman.rpc.token import BlockingToken, aio_interceptors, read_token

if TYPE_CHECKING:
    from steersman.config.manifest import ServiceSpec


def _options(tls: ClientTls | None, max_message_bytes: int) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [*channel_options(max_message_bytes), ("grpc.service_config", _SERVICE_CONFIG)]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def open_channel(
    target: str, tls: ClientTls | None = None, token: str | None = None, max_message_bytes: int = ANSWER_BYTES
) -> grpc.Channel:
    """A blocking channel; `dns:///name` targets are balanced over all addresses.

    Args:
        target: host:port, or any name that gRPC resolves.
        tls: certificates, which may be replaced while the channel is open; None: plain text.
        token: that the server asks for; None: none.
    """
    options = _options(tls, max_message_bytes)

    def make() -> grpc.Channel:
        secret = channel_credentials(tls) if tls is not None else None
        channel = grpc.secure_channel(target, secret, options) if secret else grpc.insecure_channel(target, options)
        return channel if token is None else grpc.intercept_channel(channel, BlockingToken(token))

    return make() if tls is None else FollowingChannel(make, client_files(tls))


def open_aio_channel(
    target: str,
    tls: ClientTls | None = None,
    token: str | None = None,
    max_message_bytes: int = ANSWER_BYTES,
    *,
    alone: bool = False,
) -> grpc.aio.Channel:
    """The same for asyncio. `alone`: with connections that no other channel to the same target shares."""
    options = [*_options(tls, max_message_bytes), ("grpc.use_local_subchannel_pool", int(alone))]

    def make() -> grpc.aio.Channel:
        shown = aio_interceptors(token) if token else None
        if tls is None:
            return grpc.aio.insecure_channel(target, options, interceptors=shown)
        return grpc.aio.secure_channel(target, channel_credentials(tls), options, interceptors=shown)

    return make() if tls is None else FollowingChannel(make, client_files(tls))


@dataclass(frozen=True)
class Access:
    """How a service is reached besides its address."""

    tls: ClientTls | None = None
    token: str | None = None

    @staticmethod
    def to(service: ServiceSpec, field: str) -> Access:
        """What a manifest says; ConfigError when the token's environment variable is not set."""
        return Access(service.tls, read_token(service.token_env, f"{field}.tokenEnv"))

    def open(self, target: str) -> grpc.Channel:
        return open_channel(target, self.tls, self.token)


_SERVICE_CONFIG = '{"loadBalancingConfig": [{"round_robin": {}}]}'


def wait_ready(
    channel: grpc.Channel,
    service: str,
    timeout: float,
    tick: Callable[[float], Any] = lambda seconds: None,
) -> None:
    """Waits until grpc.health.v1 says SERVING.

    Args:
        channel: to the service.
        service: full name, for example "steersman.v1.PolicyService".
        timeout: seconds.
        tick: called about every second with the seconds waited; may raise to give up.

    Raises:
        UnavailableError: not ready in time, with what it last said.
    """
    stub = health_pb2_grpc.HealthStub(channel)
    start = time.monotonic()
    state = "no answer"
    while (waited := time.monotonic() - start) < timeout:
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            state = "NOT_SERVING"
        except grpc.RpcError as error:
            state = error.details() or error.code().name
        tick(waited)
        time.sleep(min(0.25, timeout))
    raise UnavailableError(f"{service} is not ready after {timeout:.0f} s ({state}); look at its log and its endpoint")
