"""The weights transaction when its callers go away, fall silent, or come again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
import torch
from isal import isal_zlib
from safetensors.torch import save

from services.policy import weights
from services.policy.config import PolicyConfig
from services.policy.weights import WeightsServicer
from steersman.errors import DeadlineError
from steersman.nn.serialize import digest_of
from steersman.v1 import weights_pb2 as pb

PAYLOAD = save({"a": torch.ones(3)})
MANIFEST = pb.WeightsManifest(kind=pb.WEIGHTS_KIND_FULL, size=len(PAYLOAD), digest=digest_of(PAYLOAD))


class Slow:
    """An engine whose weights are in place when it is told so."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.loads = self.version = 0

    def info(self) -> SimpleNamespace:
        return SimpleNamespace(weights_version=self.version)

    def load_weights(self, update: object) -> float:
        self.loads += 1
        self.begun.set()
        assert self.go.wait(20)
        self.version = update.version  # type: ignore[attr-defined]
        return 0.5


async def chunks(*parts: tuple[int, bytes]) -> AsyncIterator[pb.UploadChunksRequest]:
    for offset, data in parts:
        yield pb.UploadChunksRequest(version=1, offset=offset, data=data, crc32=isal_zlib.crc32(data))


async def begun(servicer: WeightsServicer) -> None:
    await servicer.BeginUpdate(pb.BeginUpdateRequest(version=1, manifest=MANIFEST), None)


async def test_a_commit_whose_caller_goes_away_is_finished_and_not_done_again() -> None:
    engine = Slow()
    servicer = WeightsServicer(engine, PolicyConfig(model="m"))  # type: ignore[arg-type]
    await begun(servicer)
    await servicer.UploadChunks(chunks((0, PAYLOAD)), None)
    commit = asyncio.create_task(servicer.CommitUpdate(pb.CommitUpdateRequest(version=1), None))
    await asyncio.to_thread(engine.begun.wait, 20)
    commit.cancel()
    abort = asyncio.create_task(servicer.AbortUpdate(pb.AbortUpdateRequest(version=1), None))
    for _ in range(3):
        await asyncio.sleep(0.01)
        commit.cancel()
    assert not commit.done(), "the lock was let go while the file is read"
    assert not abort.done()
    engine.go.set()
    with pytest.raises(asyncio.CancelledError):
        await commit
    await abort
    status = await servicer.GetWeightsStatus(pb.GetWeightsStatusRequest(), None)
    assert (status.loaded_version, status.loaded_digest) == (1, MANIFEST.digest)
    again = await servicer.CommitUpdate(pb.CommitUpdateRequest(version=1), None)
    assert (again.version, engine.loads) == (1, 1)
    resumed = await servicer.BeginUpdate(pb.BeginUpdateRequest(version=1, manifest=MANIFEST), None)
    assert resumed.already_loaded


async def test_a_silent_uploader_does_not_keep_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_SECONDS", 0.05)
    engine = Slow()
    engine.go.set()
    servicer = WeightsServicer(engine, PolicyConfig(model="m"))  # type: ignore[arg-type]
    await begun(servicer)

    async def silent() -> AsyncIterator[pb.UploadChunksRequest]:
        async for chunk in chunks((0, PAYLOAD[:8])):
            yield chunk
        await asyncio.Event().wait()

    with pytest.raises(DeadlineError, match="no chunk arrived for"):
        await servicer.UploadChunks(silent(), None)
    done = await servicer.UploadChunks(chunks((8, PAYLOAD[8:])), None)
    assert done.received == len(PAYLOAD)
    assert (await servicer.CommitUpdate(pb.CommitUpdateRequest(version=1), None)).version == 1
