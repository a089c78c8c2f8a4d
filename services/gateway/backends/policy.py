"""A replica of Steersman's policy service, over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from services.gateway.backends.base import ReplicaInfo
from services.gateway.errors import BadRequestError
from steersman.config.tls import ClientTls
from steersman.errors import InternalError, UnavailableError, UnsupportedError, from_grpc
from steersman.rpc.client import open_aio_channel
from steersman.rpc.sealed import CHECKSUM, checksum_of, sealed
from steersman.v1.policy_pb2 import GetPolicyInfoRequest, PolicyServiceChatRequest, PolicyServiceChatResponse
from steersman.v1.policy_pb2_grpc import PolicyServiceStub

_STALE = 3
"""Probes in a row without an answer until another connection is opened."""
_NO_METHOD = "Method not found!"
"""What gRPC says when the path of a call is not known, which this one's is."""
_LAST_CALLS = 600.0
"""Seconds for the calls that run on a connection which was given up."""


class PolicyReplica:
    """See `services.gateway.backends.base.Replica`.

    A connection may live and fail every call: a byte that was damaged in a header stays in the table of the header
    compression until the connection ends. One that fails in such a way is therefore given up.
    """

    def __init__(self, target: str, tls: ClientTls | None, connect_seconds: float) -> None:
        self.target = target
        self._tls = tls
        self._connect_timeout = connect_seconds
        self._missed = 0
        self._given_up: set[asyncio.Task[None]] = set()
        self._open()

    def _open(self) -> None:
        self._channel = open_aio_channel(self.target, self._tls, alone=True)
        self._stub = PolicyServiceStub(self._channel)
        self._chat = self._channel.unary_stream(
            "/steersman.v1.PolicyService/Chat",
            response_deserializer=PolicyServiceChatResponse.FromString,
        )

    def _open_anew(self) -> None:
        closing = asyncio.create_task(self._channel.close(_LAST_CALLS))
        self._given_up.add(closing)
        closing.add_done_callback(self._given_up.discard)
        self._open()

    async def stream(
        self, request: PolicyServiceChatRequest, seconds: float
    ) -> AsyncIterator[PolicyServiceChatResponse]:
        data = sealed(request)
        call = self._chat(data, timeout=seconds, metadata=((CHECKSUM, checksum_of(data)),))
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                yield response
        except grpc.aio.AioRpcError as error:
            problem = from_grpc(error, "policy service")
            if isinstance(problem, InternalError) or error.details() == _NO_METHOD:
                self._open_anew()
                raise InternalError(problem.message, details=problem.details) from None
            if isinstance(problem, UnsupportedError):
                raise BadRequestError(f"The model cannot do this: {error.details()}", code="unsupported") from None
            raise problem from None
        finally:
            call.cancel()

    async def probe(self) -> ReplicaInfo:
        try:
            info = await self._stub.GetPolicyInfo(GetPolicyInfoRequest(), timeout=self._connect_timeout)
        except grpc.aio.AioRpcError as error:
            self._missed += 1
            if self._missed % _STALE == 0:
                self._open_anew()
            raise UnavailableError(f"{self.target}: {error.details() or error.code().name}") from None
        self._missed = 0
        return ReplicaInfo(info.model.name, info.weights_version, info.engine, info.model.max_context)

    async def close(self) -> None:
        for closing in self._given_up:
            closing.cancel()
        await self._channel.close()
