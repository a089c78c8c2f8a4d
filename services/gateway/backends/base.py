"""The interface of one replica that generates answers.

The contract's own messages are the gateway's domain types: every replica, of whatever kind, takes a
`PolicyServiceChatRequest` and streams `PolicyServiceChatResponse`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What a replica says about itself."""

    model: str
    weights_version: int
    engine: str
    max_context: int = 0


class Replica(Protocol):
    target: str
    """Address, for messages and metrics."""

    def stream(self, request: PolicyServiceChatRequest, seconds: float) -> AsyncIterator[PolicyServiceChatResponse]:
        """Answers; closing the iterator stops the generation.

        Args:
            request: messages (or a prompt) and sampling.
            seconds: limit for the whole answer.

        Raises:
            SteersmanError: of the class that fits the cause.
        """
        ...

    async def probe(self) -> ReplicaInfo:
        """Raises UnavailableError when no answer can be given."""
        ...

    async def close(self) -> None: ...
