"""Champion and candidate behind one gateway: a share of the conversations is the candidate's.

    key of a conversation ── BLAKE2 ──> a number in [0, 100) ── below the share ──> candidate, else champion

A conversation keeps its variant: the one that answered it first where the gateway knows (`conversation_id`), the one
that the caller sends back (header or cookie), else the one of its key, which is stable while the share is, and which a
growing share never takes from the candidate. The shares stand in a file that is read again when it changes, so a
controller (a mounted ConfigMap) or `steersman serve` moves them without a restart. Without the file, or with one that
cannot be read, everything goes to the champion; so does what a candidate that is not ready would get.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from services.gateway.backends.base import ReplicaInfo
from services.gateway.backends.pool import ReplicaPool, build_pool
from services.gateway.config import PolicyBackend
from steersman.background import Background
from steersman.config.base import FrozenModel, load_model, read_yaml
from steersman.errors import ConfigError

log = logging.getLogger("steersman.gateway")

READ_SECONDS = 1.0
"""How often the file is looked at."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class Champion(FrozenModel):
    name: Annotated[str, Field(pattern=_NAME)] = "champion"
    """What its answers are stored under."""


class Candidate(FrozenModel):
    name: Annotated[str, Field(pattern=_NAME)]
    """What its answers are stored under."""
    percent: Annotated[float, Field(ge=0, le=100)]
    """Share of the conversations."""
    endpoints: Annotated[list[str], Field(min_length=1)]
    """Replicas, as in the gateway's `policy.endpoints`."""


class Shares(FrozenModel):
    """The file."""

    champion: Champion = Champion()
    candidate: Candidate | None = None


def bucket(key: str) -> float:
    """A number in [0, 100) for the key of a conversation, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64 * 100


class SplitPool:
    """Two pools of replicas; has what `ReplicaPool` has."""

    def __init__(self, champion: ReplicaPool, path: Path, build: Callable[[list[str]], ReplicaPool]) -> None:
        """Args:
        champion: what answers without a candidate.
        path: the file with the shares, which need not exist.
        build: makes the candidate's pool from its endpoints.
        """
        self._champion = champion
        self._path = path
        self._build = build
        self._text: bytes | None = None
        self._shares = Shares()
        self._candidate: ReplicaPool | None = None
        self._probes: Background | None = None
        """Of the candidate, which comes and goes."""
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        return self._champion.ready or (self._candidate is not None and self._candidate.ready)

    @property
    def infos(self) -> dict[str, ReplicaInfo | None]:
        return self._champion.infos | (self._candidate.infos if self._candidate else {})

    @property
    def weights_version(self) -> int:
        return self._champion.weights_version

    @property
    def served(self) -> str:
        return self._champion.served

    @property
    def retries(self) -> int:
        return self._champion.retries + (self._candidate.retries if self._candidate else 0)

    @property
    def splits(self) -> bool:
        """There is a candidate now."""
        return self._candidate is not None

    def choose(self, key: str, pinned: str = "") -> str:
        """Name of the variant that answers a conversation.

        Args:
            key: of the conversation.
            pinned: the variant that answered it before; unknown ones count as none.
        """
        champion, candidate = self._shares.champion.name, self._shares.candidate
        if candidate is None or self._candidate is None or not self._candidate.ready:
            return champion
        if not self._champion.ready:
            return candidate.name
        if candidate.percent >= 100:
            return candidate.name
        if pinned == champion or (pinned == candidate.name and candidate.percent > 0):
            return pinned
        return candidate.name if bucket(key) < candidate.percent else champion

    def of(self, variant: str) -> ReplicaPool:
        """The pool of a variant; the champion's where the variant is gone."""
        candidate = self._shares.candidate
        if self._candidate is not None and candidate is not None and candidate.name == variant:
            return self._candidate
        return self._champion

    async def start(self, background: Background, of: str = "") -> None:
        await self._champion.start(background, of)
        await self.read()
        background.add(f"shares{of}", self._read_forever)

    async def close(self) -> None:
        await asyncio.gather(*self._leaving, return_exceptions=True)
        if self._probes is not None:
            await self._probes.close()
        for pool in (self._champion, self._candidate):
            if pool is not None:
                await pool.close()

    async def _read_forever(self) -> None:
        while True:
            await asyncio.sleep(READ_SECONDS)
            await self.read()

    async def read(self) -> None:
        """Obeys the file where it has changed."""
        text = await asyncio.to_thread(_contents, self._path)
        if text == self._text:
            return
        self._text = text
        try:
            shares = Shares() if text is None else load_model(Shares, read_yaml(self._path), str(self._path))
        except ConfigError as error:
            log.error("everything goes to the champion: %s", error)
            shares = self._shares.model_copy(update={"candidate": None})
        before = self._shares.candidate
        if shares.candidate is None or before is None or before.endpoints != shares.candidate.endpoints:
            self._dismiss()
            if shares.candidate is not None:
                self._candidate, self._probes = self._build(list(shares.candidate.endpoints)), Background()
                await self._probes.start()
                await self._candidate.start(self._probes)
        self._shares = shares
        share = shares.candidate
        log.info("shares: %s", f"{share.percent:g}% to {share.name}" if share else "everything to the champion")

    def _dismiss(self) -> None:
        """Lets the candidate's answers in generation end before its connections close."""
        if self._candidate is None or self._probes is None:
            return
        task = asyncio.create_task(_close_when_idle(self._candidate, self._probes))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        self._candidate = self._probes = None


def build_pools(policy: PolicyBackend, name: str) -> ReplicaPool | SplitPool:
    """The replicas of the model `name`, and a candidate's beside them where there is a file with shares."""
    champion = build_pool(policy, name)
    if policy.split is None:
        return champion
    return SplitPool(champion, policy.split, lambda endpoints: build_pool(policy, name, endpoints))


async def _close_when_idle(pool: ReplicaPool, probes: Background) -> None:
    while pool.running:  # noqa: ASYNC110 - it costs less than an event on the path of every answer
        await asyncio.sleep(0.1)
    await probes.close()
    await pool.close()


def _contents(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
