"""The pool over replicas that are away, come back with other weights, or stay away; and what it sends them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

from steersman.errors import ConflictError, InvalidArgumentError, StorageError, UnavailableError
from steersman.rpc.wire import unpack_rows
from steersman.v1 import common_pb2, policy_pb2, weights_pb2
from training.online.clients import Sample
from training.online.pool import PolicyPool
from training.online.publication import CHUNK_BYTES, Outbox, WeightsPayload

PROMPTS = [np.array([number], np.int32) for number in range(6)]
SAMPLING = common_pb2.SamplingParams(max_new_tokens=1)
PAYLOAD = WeightsPayload("full", {"w": torch.arange(8.0)})


class Away(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "it is gone"


class Replica:
    """Makes one sample a prompt, whose token is the prompt's number; `breaks` calls break off behind one sample."""

    def __init__(self, name: str, breaks: int = 0, *, stays_away: bool = False, forgets: bool = False) -> None:
        self.target = name
        self.breaks, self.stays_away, self.forgets = breaks, stays_away, forgets
        self.version, self.loads, self.made = 0, [], []
        self.digest = ""

    def wait(self) -> None: ...
    def close(self) -> None: ...
    def check_open(self) -> None: ...

    async def ready(self) -> None:
        if self.stays_away:
            raise UnavailableError(f"{self.target} stays away")

    async def loaded(self) -> weights_pb2.GetWeightsStatusResponse:
        return weights_pb2.GetWeightsStatusResponse(loaded_version=self.version, loaded_digest=self.digest)

    async def load(self, version: int, outbox: Outbox) -> float:
        self.version, self.digest = version, outbox.manifest.digest
        self.loads.append(version)
        return 0.0

    async def generate(self, request: policy_pb2.GenerateRequest) -> AsyncIterator[Sample]:
        rows = unpack_rows(request.prompts, np.int32, "prompts")
        for index, row in enumerate(rows):
            self.made.append(int(row[0]))
            yield Sample(index, 0, row, np.zeros(1, np.float32), True, (self.version,))
            if self.breaks:
                self.breaks -= 1
                if self.forgets:
                    self.version = 0
                raise Away


def pool_of(*replicas: Replica) -> PolicyPool:
    return PolicyPool(replicas, "f")  # type: ignore[arg-type]


def generated(pool: PolicyPool) -> list[tuple[int, int]]:
    found = pool.generate(PROMPTS, 1, SAMPLING)
    return sorted((sample.prompt_index, int(sample.token_ids[0])) for sample in found)


ALL = [(number, number) for number in range(6)]


def test_a_call_that_breaks_off_goes_on_with_what_is_missing() -> None:
    replica = Replica("one", breaks=2)
    assert generated(pool_of(replica)) == ALL
    # Each time the whole part is asked for again; nothing arrives twice.
    assert replica.made.count(0) == 3


def test_a_replica_that_comes_back_with_other_weights_gets_the_published_ones() -> None:
    replica = Replica("one", breaks=1, forgets=True)
    pool = pool_of(replica)
    pool.publish(PAYLOAD)
    assert generated(pool) == ALL
    assert replica.loads == [1, 1]
    assert pool.version == replica.version == 1


def test_a_replica_that_stays_away_leaves_its_work_to_the_others() -> None:
    gone, other = Replica("gone", breaks=99, stays_away=True), Replica("other")
    assert generated(pool_of(gone, other)) == ALL
    assert len(gone.made) <= 2  # a call each of the parts that it works on at once


def test_the_last_replica_that_stays_away_ends_the_batch_in_words() -> None:
    with pytest.raises(UnavailableError, match="one stays away"):
        generated(pool_of(Replica("one", breaks=99, stays_away=True)))


def test_samples_of_weights_that_nobody_published_are_refused() -> None:
    replica = Replica("one")
    pool = pool_of(replica)
    pool.publish(PAYLOAD)
    replica.version = 7  # another run has published there
    with pytest.raises(ConflictError, match=r"with weights \[7\], this run published 1"):
        generated(pool)


def test_what_is_refused_is_not_asked_for_again() -> None:
    class Refusing(Replica):
        async def generate(self, request: policy_pb2.GenerateRequest) -> AsyncIterator[Sample]:
            self.made.append(0)
            raise InvalidArgumentError("a prompt is too long")
            yield  # pragma: no cover

    replica = Refusing("one")
    with pytest.raises(InvalidArgumentError, match="a prompt is too long"):
        generated(pool_of(replica))
    assert len(replica.made) == 1


def test_weights_that_all_replicas_hold_keep_their_version() -> None:
    replicas = [Replica("one"), Replica("two")]
    pool = pool_of(*replicas)
    pool.publish(PAYLOAD)
    assert pool_of(*replicas).publish(PAYLOAD) >= 0  # a trainer that resumes
    assert [replica.version for replica in replicas] == [1, 1]
    pool.publish(WeightsPayload("full", {"w": torch.zeros(8)}))
    assert [replica.version for replica in replicas] == [2, 2]


@pytest.mark.parametrize("shared", [True, False])
def test_the_outbox_keeps_what_was_published_whatever_the_trainer_does_then(tmp_path: Path, shared: bool) -> None:
    weight = torch.arange(2.0 * CHUNK_BYTES / 4)  # more than a chunk
    outbox = Outbox(tmp_path / "weights" if shared else None)
    outbox.put(WeightsPayload("lora", {"w": weight}, {"r": 4}))
    before = weight.clone()
    weight.zero_()
    chunks = list(outbox.chunks(3))
    assert [chunk.offset for chunk in chunks] == [CHUNK_BYTES * number for number in range(len(chunks))]
    assert {chunk.version for chunk in chunks} == {3}
    data = b"".join(chunk.data for chunk in chunks)
    assert outbox.manifest.size == len(data)
    assert torch.equal(load_tensors(data)["w"], before)
    assert outbox.manifest.adapter_config_json == '{"r": 4}'
    path = tmp_path / "weights" / "weights.safetensors"
    assert outbox.manifest.artifact_url == (f"file://{path}" if shared else "")
    assert path.exists() == shared
    outbox.close()
    assert not path.exists()


def test_an_outbox_without_a_folder_to_write_to_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"weightsFolder: .*file cannot be used"):
        Outbox(tmp_path / "file")


def test_the_next_payload_takes_the_place_of_the_last(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    digests: list[Any] = []
    for value in (1.0, 2.0, 1.0):
        outbox.put(WeightsPayload("full", {"w": torch.full((4,), value)}))
        digests.append(outbox.manifest.digest)
    assert digests[0] == digests[2] != digests[1]
    assert len(list(tmp_path.iterdir())) == 1
    outbox.close()
