"""What a publication sends to the policy replicas: a safetensors file, and what it says about itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from isal import isal_zlib
from torch import Tensor

from steersman.errors import StorageError
from steersman.nn.device_memory import SUFFIX, DeviceOutbox
from steersman.nn.serialize import anonymous_file, digest_of, mapped, write_safetensors
from steersman.v1 import weights_pb2 as pb

CHUNK_BYTES = 4 * 1024 * 1024
_KINDS = {"full": pb.WEIGHTS_KIND_FULL, "lora": pb.WEIGHTS_KIND_LORA}


@dataclass(frozen=True, eq=False)
class WeightsPayload:
    """Weights to be published; the tensors are the trainer's own, nothing is copied yet."""

    kind: Literal["full", "lora"]
    tensors: Mapping[str, Tensor]
    adapter_config: Mapping[str, Any] | None = None


class Outbox:
    """The last payload as it was when it was published: a file in the folder that trainer and replicas share, or one
    in memory that is sent in chunks. The next payload takes its place, because fresh memory costs more than the copy.
    """

    def __init__(self, folder: Path | None) -> None:
        """Args:
        folder: this run's own.

        Raises:
            StorageError: the folder cannot be written to.
        """
        self._path = folder / "weights.safetensors" if folder else None
        self._device = DeviceOutbox() if folder else None
        """Of weights that are on a GPU; None: they leave it."""
        self.manifest = pb.WeightsManifest()
        """Of the last payload; `size` is 0 before the first."""
        try:
            if self._path is None:
                self._file = anonymous_file()
            else:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Of a trainer that was killed; a replica may still be reading it, so it must not be cut short.
                self._path.unlink(missing_ok=True)
                self._file = self._path.open("w+b")
        except OSError as error:
            raise StorageError(
                f"services.policy.weightsFolder: {folder} cannot be used ({error.strerror}); give a folder that "
                "trainer and policy replicas share"
            ) from None

    @property
    def on_device(self) -> bool:
        """The last payload is in a GPU's memory, where only replicas on the same GPU find it."""
        return self.manifest.artifact_url.endswith(SUFFIX)

    def leave_device(self) -> None:
        """Further payloads go through the folder's file."""
        if self._device is not None:
            self._device.close()
        self._device = None

    def put(self, payload: WeightsPayload) -> None:
        """Raises StorageError when there is no room."""
        self.manifest = pb.WeightsManifest()
        if self._device is not None and all(tensor.is_cuda for tensor in payload.tensors.values()):
            try:
                self._put_on_device(self._device, payload)
                return
            except (MemoryError, OSError, torch.cuda.OutOfMemoryError):
                self.leave_device()
        try:
            write_safetensors(payload.tensors, self._file)
        except OSError as error:
            raise StorageError(
                f"weights cannot be written to {self._path or 'memory'} ({error.strerror}); free space there"
            ) from None
        with mapped(self._file) as data:
            self.manifest = _manifest(payload, len(data), digest_of(data), self._path)

    def _put_on_device(self, device: DeviceOutbox, payload: WeightsPayload) -> None:
        assert self._path is not None
        path = self._path.with_name(f"weights{SUFFIX}")
        size, digest = device.put(payload.tensors, path)
        self.manifest = _manifest(payload, size, digest, path)

    def chunks(self, version: int) -> Iterator[pb.UploadChunksRequest]:
        with mapped(self._file) as data:
            for offset in range(0, len(data), CHUNK_BYTES):
                part = data[offset : offset + CHUNK_BYTES]
                yield pb.UploadChunksRequest(version=version, offset=offset, data=part, crc32=isal_zlib.crc32(part))

    def close(self) -> None:
        """Frees the memory and removes the files; a replica that has loaded them does not need them any more."""
        self._file.close()
        self.leave_device()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path.with_name(f"weights{SUFFIX}").unlink(missing_ok=True)


def _manifest(payload: WeightsPayload, size: int, digest: str, path: Path | None) -> pb.WeightsManifest:
    return pb.WeightsManifest(
        kind=_KINDS[payload.kind],  # type: ignore[arg-type]
        size=size,
        digest=digest,
        adapter_config_json=json.dumps(payload.adapter_config) if payload.adapter_config else "",
        artifact_url=f"file://{path}" if path else "",
    )
