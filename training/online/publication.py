"""What a publication sends to the policy replicas: a safetensors file, and what it says about itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isal import isal_zlib
from torch import Tensor

from steersman.errors import StorageError
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

    def put(self, payload: WeightsPayload) -> None:
        """Raises StorageError when there is no room."""
        self.manifest = pb.WeightsManifest()
        try:
            write_safetensors(payload.tensors, self._file)
        except OSError as error:
            raise StorageError(
                f"weights cannot be written to {self._path or 'memory'} ({error.strerror}); free space there"
            ) from None
        with mapped(self._file) as data:
            self.manifest = pb.WeightsManifest(
                kind=_KINDS[payload.kind],  # type: ignore[arg-type]
                size=len(data),
                digest=digest_of(data),
                adapter_config_json=json.dumps(payload.adapter_config) if payload.adapter_config else "",
                artifact_url=f"file://{self._path}" if self._path else "",
            )

    def chunks(self, version: int) -> Iterator[pb.UploadChunksRequest]:
        with mapped(self._file) as data:
            for offset in range(0, len(data), CHUNK_BYTES):
                part = data[offset : offset + CHUNK_BYTES]
                yield pb.UploadChunksRequest(version=version, offset=offset, data=part, crc32=isal_zlib.crc32(part))

    def close(self) -> None:
        """Frees the memory and removes the file; a replica that has loaded it does not need it any more."""
        self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
