"""Several models behind one gateway: which of them answers, and who stands in for it.

    name ── alias ──> model
    name ── route: weights ──> model            a conversation keeps the model that answered it first
    model ── not ready, full, or gone before its first token ──> its fallbacks, in their order

Of a model with a candidate `split` then chooses the variant.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from services.gateway.backends.base import ReplicaInfo
from services.gateway.backends.pool import RETRIED, ReplicaPool
from services.gateway.backends.split import SplitPool, build_pools
from services.gateway.config import GatewayConfig, PolicyBackend, Route, ServedModel
from steersman.background import Background
from steersman.errors import NotFoundError
from steersman.v1.policy_pb2 import PolicyServiceChatRequest, PolicyServiceChatResponse

log = logging.getLogger("steersman.gateway")


@dataclass(frozen=True, slots=True)
class Served:
    """A model with its replicas."""

    name: str
    pool: ReplicaPool | SplitPool
    deployment: str
    """What its answers are stored under where there is no candidate."""
    fallback: tuple[str, ...]
    cost: float
    """What a token of it counts against keys."""
    samples: int
    """That an answer takes."""


class Line:
    """Who is to answer one question: a model, and behind it those that stand in for it."""

    def __init__(
        self,
        served: list[Served],
        asked: str,
        key: str,
        pinned: str,
        stood_in: Callable[[str, str], None],
    ) -> None:
        """Args:
        served: in the order in which they are asked; at least one.
        asked: the name that the caller used, where it is one of the first's own names; else empty.
        key: of the conversation, for the choice between champion and candidate.
        pinned: the variant that answered it before.
        stood_in: told the names of the model that could not answer and of the next.
        """
        self._left = served
        self._asked = asked
        self._key = key
        self._pinned = pinned
        self._stood_in = stood_in
        self.variant = self._variant()

    @property
    def served(self) -> Served:
        """Who answers."""
        return self._left[0]

    @property
    def name(self) -> str:
        """Of the model, as the caller knows it."""
        return self._asked or self.served.name

    @property
    def deployment(self) -> str:
        """What the answer is stored under."""
        return self.variant or self.served.deployment

    @property
    def adapter(self) -> str:
        """The model or adapter that the replicas say they serve."""
        return self.served.pool.of(self.variant).served

    async def stream(
        self, request: PolicyServiceChatRequest, seconds: float
    ) -> AsyncGenerator[PolicyServiceChatResponse, None]:
        """Streams one turn; before its first response the next in the line may take over, for this and later turns.

        Raises:
            SteersmanError: what the last one said.
        """
        while True:
            if not self.served.pool.ready and any(other.pool.ready for other in self._left[1:]):
                self._next()
                continue
            started = False
            replicas = self.served.pool.of(self.variant)
            try:
                async with contextlib.aclosing(replicas.stream(request, seconds)) as stream:
                    async for response in stream:
                        started = True
                        yield response
                return
            except RETRIED as error:
                if started or len(self._left) == 1:
                    raise
                log.warning("a model cannot answer: %s", error, extra={"model": self.served.name})
            self._next()

    def _next(self) -> None:
        gone = self._left[0].name
        self._left = self._left[1:]
        self._asked = ""
        self.variant = self._variant()
        self._stood_in(gone, self.served.name)

    def _variant(self) -> str:
        pool = self.served.pool
        return pool.choose(self._key, self._pinned) if isinstance(pool, SplitPool) else ""


class Models:
    """All of them, by name."""

    def __init__(self, config: GatewayConfig, stood_in: Callable[[str, str], None]) -> None:
        """`stood_in`: see `Line`."""
        main = ServedModel(
            name=config.model,
            aliases=config.model_aliases,
            policy=config.policy,
            deployment=config.deployment,
            fallback=config.fallback,
            cost=config.cost,
        )
        self._stood_in = stood_in
        self._served: dict[str, Served] = {}
        self._called: dict[str, str | Route] = {}
        """By every name that callers may use: the model's own, or the route."""
        for model in (main, *config.models):
            self._served[model.name] = _serve(model)
            self._called |= dict.fromkeys((model.name, *model.aliases), model.name)
        for route in config.routes:
            self._called[route.name] = route
        self.main = self._served[config.model]
        self.names = tuple(self._called)

    @property
    def ready(self) -> bool:
        """One of them can answer: a gateway that answers for some models is not taken out for another's sake."""
        return any(served.pool.ready for served in self._served.values())

    def can_answer(self, name: str) -> bool:
        """Whether a question to this name would find a model, itself or one that stands in for it."""
        return any(served.pool.ready for served in self._candidates(name))

    @property
    def readiness(self) -> dict[str, bool]:
        return {name: self.can_answer(name) for name in self.names}

    @property
    def infos(self) -> dict[str, ReplicaInfo | None]:
        """Of all replicas by address; with the model before it where it is not the gateway's first."""
        return {
            target if served is self.main else f"{served.name} {target}": info
            for served in self._served.values()
            for target, info in served.pool.infos.items()
        }

    @property
    def retries(self) -> int:
        return sum(served.pool.retries for served in self._served.values())

    def check(self, name: str) -> None:
        """Raises NotFoundError for a name that no model has."""
        if name not in self._called:
            raise NotFoundError(
                f"The model '{name[:128]}' does not exist here; use '{self.main.name}'",
                details={"param": "model", "code": "model_not_found"},
            )

    def most(self, name: str) -> tuple[int, float]:
        """Samples and cost of a token, of the dearest model that may answer for a name."""
        candidates = self._candidates(name)
        return max(served.samples for served in candidates), max(served.cost for served in candidates)

    def chooses(self, name: str) -> bool:
        """Who answered a conversation before decides who answers it now."""
        if isinstance(self._called[name or self.main.name], Route):
            return True
        return any(isinstance(served.pool, SplitPool) and served.pool.splits for served in self._candidates(name))

    def line(self, name: str, key: str, pinned_model: str, pinned_variant: str) -> Line:
        """Who is to answer.

        Args:
            name: that the caller used; empty: the gateway's model.
            key: of the conversation.
            pinned_model: that answered it before; unknown ones count as none.
            pinned_variant: the same of champion and candidate.
        """
        candidates = self._candidates(name)
        target = self._called[name or self.main.name]
        if isinstance(target, str):
            return Line(candidates, name, key, pinned_variant, self._stood_in)
        chosen = pinned_model if pinned_model in target.weights else weighted(target.weights, key)
        first = self._served[chosen]
        order = dict.fromkeys([first.name, *first.fallback, *(served.name for served in candidates)])
        return Line([self._served[each] for each in order], "", key, pinned_variant, self._stood_in)

    async def start(self, background: Background) -> None:
        for served in self._served.values():
            await served.pool.start(background, "" if served is self.main else f" of {served.name}")

    async def close(self) -> None:
        await asyncio.gather(*(served.pool.close() for served in self._served.values()))

    def _candidates(self, name: str) -> list[Served]:
        """Who may answer for a name: its model before its fallbacks; of a route all."""
        target = self._called[name or self.main.name]
        firsts = [target] if isinstance(target, str) else list(target.weights)
        stand_ins = [other for first in firsts for other in self._served[first].fallback]
        return [self._served[each] for each in dict.fromkeys([*firsts, *stand_ins])]


def weighted(weights: dict[str, float], key: str) -> str:
    """One of the names, by weight and the same for the same key everywhere.

    Highest random weight: where weights change or a name comes or goes, no conversation moves between two others.
    """

    def score(name: str) -> float:
        digest = hashlib.blake2b(f"{name}\n{key}".encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "big") + 0.5) / 2**64
        return -weights[name] / math.log(uniform)

    return max(weights, key=score)


def _serve(model: ServedModel) -> Served:
    policy: PolicyBackend = model.policy
    return Served(
        model.name,
        build_pools(policy, model.name),
        model.name if model.deployment is None else model.deployment,
        tuple(model.fallback),
        model.cost,
        policy.best_of.n if policy.best_of else 1,
    )
