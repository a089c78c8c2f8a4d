"""Several replicas of one model: the least busy answers; another takes over before the first token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from services.gateway.backends.base import Replica, ReplicaInfo
from services.gateway.backends.neutral import Neutraliser, NeutralReplica
from services.gateway.backends.policy import PolicyReplica
from services.gateway.config import PolicyBackend
from steersman.background import Background
from steersman.environment import header_secret_in
from steersman.errors import (
    ChecksumError,
    InternalError,
    RateLimitedError,
    SteersmanError,
    UnavailableError,
)
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse

log = logging.getLogger("steersman.gateway")

# The same request may succeed elsewhere: generation has no side effects.
RETRIED = (UnavailableError, RateLimitedError, InternalError, ChecksumError)
# It may succeed at the same replica, where there is no other: it was damaged on its way, or its connection was.
_AGAIN = (InternalError, ChecksumError)


@dataclass(slots=True, eq=False)
class _Member:
    replica: Replica
    info: ReplicaInfo | None = None
    """None: not ready."""
    running: int = 0
    missed: int = 0
    """Probes in a row without an answer."""


class ReplicaPool:
    def __init__(self, replicas: Sequence[Replica], probe_seconds: float) -> None:
        self._members = [_Member(replica) for replica in replicas]
        self._probe_seconds = probe_seconds
        self.retries = 0

    @property
    def ready(self) -> bool:
        return any(member.info for member in self._members)

    @property
    def infos(self) -> dict[str, ReplicaInfo | None]:
        """By target; None where not ready."""
        return {member.replica.target: member.info for member in self._members}

    @property
    def running(self) -> int:
        """Answers in generation."""
        return sum(member.running for member in self._members)

    def of(self, variant: str) -> ReplicaPool:
        """The pool that answers for a variant: there is one."""
        return self

    @property
    def weights_version(self) -> int:
        """The newest that a ready replica serves; 0 when none is ready."""
        return max((member.info.weights_version for member in self._members if member.info), default=0)

    @property
    def served(self) -> str:
        """The model or adapter that the replicas say they serve; empty while none is ready."""
        return next((member.info.model for member in self._members if member.info), "")

    async def start(self, background: Background, of: str = "") -> None:
        """`of`: goes into the names of the tasks, each of which is once in `background`."""
        await self._probe_all()
        background.add(f"probes{of}", self._probe_forever)

    async def close(self) -> None:
        await asyncio.gather(*(member.replica.close() for member in self._members))

    async def stream(
        self, request: PolicyServiceChatRequest, seconds: float
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        """Streams the answer of one replica; before its first response others are tried, each once.

        One that is alone is tried twice where the fault may have been on the way.

        Raises:
            RateLimitedError: every replica is full.
            UnavailableError: no replica can be reached.
            SteersmanError: what the replica said.
        """
        tried: list[_Member] = []
        while True:
            member = self._choose(tried)
            tried.append(member)
            member.running += 1
            started = False
            stream: AsyncIterator[PolicyServiceChatResponse] = member.replica.stream(request, seconds)
            try:
                async for response in stream:
                    started = True
                    yield response
                return
            except RETRIED as error:
                if isinstance(error, UnavailableError):
                    member.info = None
                most = max(len(self._members), 2 if isinstance(error, _AGAIN) else 1)
                if started or len(tried) >= most:
                    raise
                self.retries += 1
                log.warning("replica failed, trying another", extra={"replica": member.replica.target})
            finally:
                member.running -= 1
                # A closed generator of ours must close the replica's at once, not when it is collected.
                await stream.aclose()  # type: ignore[attr-defined]

    def _choose(self, tried: list[_Member]) -> _Member:
        candidates = [member for member in self._members if member not in tried] or self._members
        return min(candidates, key=lambda member: (member.info is None, member.running))

    async def _probe_forever(self) -> None:
        while True:
            await asyncio.sleep(self._probe_seconds)
            await self._probe_all()

    async def _probe_all(self) -> None:
        await asyncio.gather(*(self._probe(member) for member in self._members))

    async def _probe(self, member: _Member) -> None:
        try:
            info = await member.replica.probe()
        except Exception as error:
            if not isinstance(error, SteersmanError):
                log.exception("a probe failed", extra={"replica": member.replica.target})
            member.missed += 1
            # One late answer is a busy replica, two in a row are none.
            if member.info is not None and member.missed > 1:
                log.warning("replica is not ready: %s", error, extra={"replica": member.replica.target})
                member.info = None
        else:
            member.missed = 0
            if member.info is None:
                log.info("replica is ready", extra={"replica": member.replica.target})
            member.info = info


def build_pool(policy: PolicyBackend, name: str, endpoints: Sequence[str] | None = None) -> ReplicaPool:
    """The replicas of the model `name`; `endpoints`: others of the same kind."""
    replicas: list[Replica] = []
    neutraliser = None
    if policy.kind != "steersman" and policy.control_tokens == "neutralise":
        neutraliser = Neutraliser(policy.tokenizer)
    for endpoint in policy.endpoints if endpoints is None else endpoints:
        if policy.kind == "steersman":
            replicas.append(PolicyReplica(endpoint, policy.tls, policy.connect_timeout_seconds))
            continue
        key = header_secret_in(policy.api_key_env, "policy.apiKeyEnv") if policy.api_key_env else ""
        model = policy.model or name
        if policy.kind == "openai":
            from services.gateway.backends.openai import OpenAIReplica

            foreign: Replica = OpenAIReplica(endpoint, model, key, policy.connect_timeout_seconds)
        else:
            from services.gateway.backends.tgi import TgiReplica

            foreign = TgiReplica(endpoint, key, policy.connect_timeout_seconds)
        replicas.append(foreign if neutraliser is None else NeutralReplica(foreign, neutraliser))
    if policy.best_of is not None:
        from services.gateway.backends.best_of import BestOfReplica, RewardJudge

        choose = policy.best_of
        replicas = [BestOfReplica(replica, choose.n, RewardJudge(choose, policy.tls)) for replica in replicas]
    return ReplicaPool(replicas, policy.probe_seconds)
