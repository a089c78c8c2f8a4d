"""TLS for servers and clients, by files that may be replaced while the process runs.

Certificates of a cluster live for weeks: cert-manager writes new files, and nothing is restarted for it. A server looks
at its files at each handshake, a client before a call; connections that are open go on.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from steersman.config.tls import ClientTls, Tls
from steersman.errors import ConfigError, why

log = logging.getLogger("steersman.rpc")

LOOK_SECONDS = 1.0
"""Files are looked at no more often."""


class Files:
    """Says when one of some files has changed, and reads them as one."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._seen: tuple[Any, ...] = ()
        self._next_look = 0.0

    def changed(self) -> bool:
        """Whether they are others than at the last call that said so; True at the first call."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        state = tuple(_state(path) for path in self._paths)
        changed, self._seen = state != self._seen, state
        return changed


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def check_pair(cert: Path, key: Path, field: str) -> None:
    """Raises ConfigError when the files are no certificate with its private key, as between two writes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{field}: {cert} and {key} cannot be used ({why(error)}); give a certificate and its private key in PEM"
        ) from None


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials that follow their files; files that do not fit together are not taken, the last good ones stay.

    Raises:
        ConfigError: the files cannot be used now.
    """
    files = Files([path for path in (tls.cert, tls.key, tls.client_ca) if path is not None])
    files.changed()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        try:
            if not files.changed():
                return None
            configuration = _server_files(tls)
        except Exception as error:  # a handshake must not fail for it
            log.warning("the certificate stays as it is: %s", error)
            return None
        log.info("a new certificate is in use: %s", tls.cert)
        return configuration

    return grpc.dynamic_ssl_server_credentials(_server_files(tls), fetch, tls.client_ca is not None)


def _server_files(tls: Tls) -> grpc.ServerCertificateConfiguration:
    check_pair(tls.cert, tls.key, "tls")
    return grpc.ssl_server_certificate_configuration(
        [(_read(tls.key, "tls.key"), _read(tls.cert, "tls.cert"))],
        root_certificates=_read(tls.client_ca, "tls.clientCa") if tls.client_ca else None,
    )


async def follow_files(context: ssl.SSLContext, tls: Tls) -> None:
    """Keeps the context of a server that is not gRPC's up to date; new connections show the new certificate.

    An authority that was trusted stays so until the process ends: a context forgets none.
    """
    files = Files([path for path in (tls.cert, tls.key, tls.client_ca) if path is not None])
    files.changed()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if not files.changed():
            continue
        try:
            check_pair(tls.cert, tls.key, "tls")
            context.load_cert_chain(tls.cert, tls.key)
            if tls.client_ca is not None:
                context.load_verify_locations(tls.client_ca)
        except (ConfigError, OSError) as error:
            log.warning("the certificate stays as it is: %s", error)
        else:
            log.info("a new certificate is in use: %s", tls.cert)


def channel_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """Raises ConfigError when a file cannot be used."""
    if (tls.cert is None) != (tls.key is None):
        raise ConfigError("tls: cert and key belong together; give both or none")
    if tls.cert is not None and tls.key is not None:
        check_pair(tls.cert, tls.key, "tls")
    return grpc.ssl_channel_credentials(
        _read(tls.ca, "tls.ca"),
        _read(tls.key, "tls.key") if tls.key else None,
        _read(tls.cert, "tls.cert") if tls.cert else None,
    )


def client_files(tls: ClientTls) -> Files:
    return Files([path for path in (tls.ca, tls.cert, tls.key) if path is not None])


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{field}: {path} cannot be read ({error.strerror}); check the path and its mode") from None


class FollowingChannel:
    """A channel that is opened anew when its certificate files have changed; calls under way end on the old one.

    It has what stubs need of `grpc.Channel` and `grpc.aio.Channel`: multi-callables that choose the channel when they
    are called.
    """

    def __init__(self, make: Callable[[], Any], files: Files) -> None:
        """Args:
        make: opens a channel with the files as they are; ConfigError when they cannot be used.
        """
        self._make = make
        self._files = files
        self._lock = threading.Lock()
        files.changed()
        self._channels = [make()]

    def current(self) -> Any:
        """The channel for a new call."""
        if self._files.changed():
            with self._lock:
                try:
                    self._channels.append(self._make())
                except ConfigError as error:
                    log.warning("the certificate stays as it is: %s", error)
        return self._channels[-1]

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return _FollowingCall(self, "unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return _FollowingCall(self, "unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return _FollowingCall(self, "stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return _FollowingCall(self, "stream_stream", arguments, options)

    def close(self, *arguments: Any) -> Any:
        """Closes all of them; awaitable where the channel is one of asyncio."""
        closing = [channel.close(*arguments) for channel in self._channels]
        if all(item is None for item in closing):
            return None

        async def close_all() -> None:
            for item in closing:
                await item

        return close_all()

    def __enter__(self) -> FollowingChannel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> FollowingChannel:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.current(), name)


class _FollowingCall:
    """A multi-callable of the channel that is current when it is called."""

    def __init__(self, owner: FollowingChannel, kind: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._owner = owner
        self._kind = kind
        self._arguments = arguments
        self._options = options
        self._made: tuple[Any, Any] = (None, None)

    def _call(self) -> Any:
        channel = self._owner.current()
        made_of, call = self._made
        if made_of is not channel:
            call = getattr(channel, self._kind)(*self._arguments, **self._options)
            self._made = (channel, call)
        return call

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._call()(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call(), name)
