"""Channels to the services, and waiting until they are ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steersman.config.base import FrozenModel
from steersman.errors import ConfigError, UnavailableError
from steersman.rpc.server import MAX_MESSAGE_BYTES, channel_options


class ClientTls(FrozenModel):
    """Files in PEM format."""

    ca: Path
    """Authority that signed the server's certificate."""
    cert: Path | None = None
    """Own certificate, for mTLS."""
    key: Path | None = None
    """Own private key, for mTLS."""


def credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """Raises ConfigError when a file cannot be read."""
    try:
        return grpc.ssl_channel_credentials(
            tls.ca.read_bytes(),
            tls.key.read_bytes() if tls.key else None,
            tls.cert.read_bytes() if tls.cert else None,
        )
    except OSError as error:
        raise ConfigError(f"tls: {error.filename} cannot be read ({error.strerror}); check the path") from None


def open_channel(target: str, tls: ClientTls | None = None, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.Channel:
    """A blocking channel; `dns:///name` targets are balanced over all addresses."""
    options = [*channel_options(max_message_bytes), ("grpc.service_config", _SERVICE_CONFIG)]
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials(tls), options=options)


def open_aio_channel(
    target: str, tls: ClientTls | None = None, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> grpc.aio.Channel:
    """The same for asyncio."""
    options = [*channel_options(max_message_bytes), ("grpc.service_config", _SERVICE_CONFIG)]
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials(tls), options=options)


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
