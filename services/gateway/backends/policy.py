"""A replica of Steersman's policy service, over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from services.gateway.backends.base import ReplicaInfo
from services.gateway.errors import BadRequestError
from steersman.config.tls import ClientTls
from steersman.errors import UnavailableError, from_grpc
from steersman.rpc.client import open_aio_channel
from steersman.v1.policy_pb2 import GetPolicyInfoRequest, PolicyServiceChatRequest, PolicyServiceChatResponse
from steersman.v1.policy_pb2_grpc import PolicyServiceStub


class PolicyReplica:
    """See `services.gateway.backends.base.Replica`."""

    def __init__(self, target: str, tls: ClientTls | None, connect_seconds: float) -> None:
        self.target = target
        self._connect_timeout = connect_seconds
        self._channel = open_aio_channel(target, tls)
        self._stub = PolicyServiceStub(self._channel)

    async def stream(
        self, request: PolicyServiceChatRequest, seconds: float
    ) -> AsyncIterator[PolicyServiceChatResponse]:
        call = self._stub.Chat(request, timeout=seconds)
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                yield response
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise BadRequestError(f"The model cannot do this: {error.details()}", code="unsupported") from None
            raise from_grpc(error, "policy service") from None
        finally:
            call.cancel()

    async def probe(self) -> ReplicaInfo:
        try:
            info = await self._stub.GetPolicyInfo(GetPolicyInfoRequest(), timeout=self._connect_timeout)
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(f"{self.target}: {error.details() or error.code().name}") from None
        return ReplicaInfo(info.model.name, info.weights_version, info.engine, info.model.max_context)

    async def close(self) -> None:
        await self._channel.close()
