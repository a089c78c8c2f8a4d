"""The weights transaction: begin, upload, commit or abort. Servicer of the control plane."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import fsspec
import grpc
from blake3 import blake3
from isal import isal_zlib
from torch import Tensor

from services.policy.config import PolicyConfig
from services.policy.engine import Engine, WeightsUpdate
from services.policy.engine_kinds import ENGINES
from steersman.errors import (
    ChecksumError,
    ConflictError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
    why,
)
from steersman.net import fetched
from steersman.nn.device_memory import SUFFIX, opened_tensors
from steersman.nn.ilql import split_heads
from steersman.nn.serialize import anonymous_file, digest_of, mapped, mapped_tensors
from steersman.v1 import weights_pb2 as pb
from steersman.v1 import weights_pb2_grpc

log = logging.getLogger("steersman.policy.weights")

_FILE = "file://"
CHUNK_SECONDS = 60.0
"""Longest wait for the next chunk of an upload; the transaction stays, another call may go on with it."""
_KINDS = {pb.WEIGHTS_KIND_FULL: "full", pb.WEIGHTS_KIND_LORA: "lora"}


@dataclass
class _Transaction:
    version: int
    manifest: pb.WeightsManifest
    file: IO[bytes]
    digest: blake3 = field(default_factory=blake3)
    received: int = 0


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    """One transaction at a time. What is being uploaded lies in an anonymous file."""

    def __init__(self, engine: Engine, config: PolicyConfig) -> None:
        self._engine = engine
        self._config = config
        self._open: _Transaction | None = None
        self._loaded_digest = ""
        self._lock = asyncio.Lock()

    @property
    def _loaded(self) -> int:
        return self._engine.info().weights_version

    async def BeginUpdate(
        self, request: pb.BeginUpdateRequest, context: grpc.aio.ServicerContext
    ) -> pb.BeginUpdateResponse:
        async with self._lock:
            manifest = request.manifest
            if request.version == self._loaded and manifest.digest == self._loaded_digest:
                return pb.BeginUpdateResponse(already_loaded=True)
            if request.version <= self._loaded:
                raise FailedPreconditionError(
                    f"version {request.version} is not newer than the loaded version {self._loaded}; count up"
                )
            if self._open is not None and self._open.version != request.version:
                raise ConflictError(
                    f"version {self._open.version} is being uploaded; abort it before version {request.version} begins"
                )
            self._check(manifest)
            self._close_transaction()
            self._open = _Transaction(request.version, manifest, anonymous_file())
            return pb.BeginUpdateResponse()

    def _check(self, manifest: pb.WeightsManifest) -> None:
        if manifest.kind not in _KINDS:
            raise InvalidArgumentError("manifest.kind is unspecified; it must be FULL or LORA")
        if len(manifest.digest) != 64:
            raise InvalidArgumentError("manifest.digest must be 64 hexadecimal digits")
        if not 0 < manifest.size <= self._config.max_upload_bytes:
            raise InvalidArgumentError(
                f"manifest.size is {manifest.size}; it must be 1 to maxUploadBytes ({self._config.max_upload_bytes})"
            )
        if (manifest.kind == pb.WEIGHTS_KIND_LORA) != bool(manifest.adapter_config_json):
            raise InvalidArgumentError("manifest.adapter_config_json belongs to kind LORA, and only to it")
        url = manifest.artifact_url
        if url and (".." in url.split("/") or not any(url.startswith(one) for one in self._config.artifact_urls)):
            raise PermissionDeniedError(f"{url} is under none of the service's artifactUrls")

    def _transaction(self, version: int) -> _Transaction:
        if self._open is None or self._open.version != version:
            raise FailedPreconditionError(f"no transaction for version {version} is open; call BeginUpdate first")
        return self._open

    async def UploadChunks(
        self, request_iterator: AsyncIterator[pb.UploadChunksRequest], context: grpc.aio.ServicerContext
    ) -> pb.UploadChunksResponse:
        async with self._lock:
            transaction: _Transaction | None = None
            # A chunk is stored and hashed while the next one is on its way.
            storing: asyncio.Future[None] | None = None
            chunks = aiter(request_iterator)
            try:
                while (chunk := await self._next(chunks)) is not None:
                    if storing is not None:
                        await storing
                    transaction = self._transaction(chunk.version)
                    if chunk.offset != transaction.received:
                        raise InvalidArgumentError(
                            f"offset is {chunk.offset}, but {transaction.received} bytes are here; continue there"
                        )
                    if transaction.received + len(chunk.data) > transaction.manifest.size:
                        raise InvalidArgumentError(
                            f"more bytes than manifest.size ({transaction.manifest.size}) arrived"
                        )
                    storing = asyncio.ensure_future(asyncio.to_thread(self._append, transaction, chunk))
            finally:
                if storing is not None:
                    await storing
            return pb.UploadChunksResponse(received=transaction.received if transaction is not None else 0)

    @staticmethod
    async def _next(chunks: AsyncIterator[pb.UploadChunksRequest]) -> pb.UploadChunksRequest | None:
        """The next chunk; None at the end. An uploader that falls silent must not keep the others out."""
        try:
            return await asyncio.wait_for(anext(chunks, None), CHUNK_SECONDS)
        except TimeoutError:
            raise DeadlineError(
                f"no chunk arrived for {CHUNK_SECONDS:.0f} s; begin the upload again where it stopped"
            ) from None

    def _append(self, transaction: _Transaction, chunk: pb.UploadChunksRequest) -> None:
        if isal_zlib.crc32(chunk.data) != chunk.crc32:
            raise ChecksumError(f"the chunk at {chunk.offset} does not have its checksum; send it again")
        self._store(transaction, chunk.data)

    @staticmethod
    def _store(transaction: _Transaction, data: bytes) -> None:
        try:
            transaction.file.write(data)
        except OSError as error:
            raise StorageError(f"weights cannot be stored ({error.strerror}); free space for temporary files") from None
        transaction.digest.update(data)
        transaction.received += len(data)

    async def CommitUpdate(
        self, request: pb.CommitUpdateRequest, context: grpc.aio.ServicerContext
    ) -> pb.CommitUpdateResponse:
        async with self._lock:
            if request.version == self._loaded and self._open is None:
                return pb.CommitUpdateResponse(version=request.version)
            transaction = self._transaction(request.version)
            # A caller that goes away must not tear the swap: it runs to its end with the lock, and is remembered.
            loading = asyncio.ensure_future(asyncio.to_thread(self._apply, transaction))
            try:
                pause = await asyncio.shield(loading)
            except asyncio.CancelledError:
                await self._ended(loading)
                if loading.exception() is None:
                    self._loaded_now(transaction, loading.result())
                raise
            self._loaded_now(transaction, pause)
            return pb.CommitUpdateResponse(version=request.version, pause_seconds=pause)

    @staticmethod
    async def _ended(loading: asyncio.Future[float]) -> None:
        """Waits for the end of a load, however often the caller is cancelled."""
        while not loading.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([loading])

    def _loaded_now(self, transaction: _Transaction, pause: float) -> None:
        self._loaded_digest = transaction.manifest.digest
        self._close_transaction()
        log.info("weights version %d loaded, generation paused for %.3f s", transaction.version, pause)

    def _apply(self, transaction: _Transaction) -> float:
        manifest = transaction.manifest
        if not manifest.artifact_url.startswith(_FILE):
            if manifest.artifact_url:
                self._read_artifact(transaction)
            transaction.file.flush()
            path = Path(f"/proc/self/fd/{transaction.file.fileno()}")
            _check_whole(manifest, transaction.received, transaction.digest.hexdigest())
            return self._load(transaction, _tensors_in(path))
        path = Path(manifest.artifact_url.removeprefix(_FILE))  # read where it lies
        if path.name.endswith(SUFFIX):
            info = self._engine.info()
            if info.engine != "transformers" or not info.device.startswith("cuda"):
                raise FailedPreconditionError(f"engine {info.engine} on {info.device} does not read a GPU's memory")
            with opened_tensors(path) as (tensors, size, digest):
                _check_whole(manifest, size, digest)
                return self._load(transaction, tensors)
        try:
            with mapped(path) as data:
                size, digest = len(data), digest_of(data)
        except (OSError, ValueError) as error:
            raise FailedPreconditionError(
                f"{manifest.artifact_url} cannot be read ({why(error)}); do trainer and replica see the same folder?"
            ) from None
        _check_whole(manifest, size, digest)
        return self._load(transaction, _tensors_in(path))

    def _load(self, transaction: _Transaction, tensors: dict[str, Tensor]) -> float:
        manifest = transaction.manifest
        if not ENGINES[self._config.engine].holds_heads and split_heads(tensors)[1]:
            raise FailedPreconditionError(
                f"the update holds the Q and V heads of ILQL, which engine {self._config.engine} cannot sample with; "
                "use engine transformers"
            )
        update = WeightsUpdate(
            version=transaction.version,
            kind=_KINDS[manifest.kind],  # type: ignore[arg-type]
            tensors=tensors,
            adapter_config=json.loads(manifest.adapter_config_json) if manifest.adapter_config_json else None,
        )
        return self._engine.load_weights(update)

    def _read_artifact(self, transaction: _Transaction) -> None:
        transaction.file.seek(0)
        transaction.file.truncate()
        transaction.received, transaction.digest = 0, blake3()
        try:
            for data in _pieces(transaction.manifest.artifact_url):
                self._store(transaction, data)
        except (FileNotFoundError, NotFoundError):
            raise FailedPreconditionError(f"{transaction.manifest.artifact_url} does not exist") from None

    async def AbortUpdate(
        self, request: pb.AbortUpdateRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortUpdateResponse:
        async with self._lock:
            if self._open is not None and self._open.version == request.version:
                self._close_transaction()
            return pb.AbortUpdateResponse()

    def _close_transaction(self) -> None:
        if self._open is not None:
            self._open.file.close()
            self._open = None

    async def GetWeightsStatus(
        self, request: pb.GetWeightsStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetWeightsStatusResponse:
        return pb.GetWeightsStatusResponse(
            loaded_version=self._loaded,
            loaded_digest=self._loaded_digest,
            pending_version=self._open.version if self._open else 0,
            received=self._open.received if self._open else 0,
        )


def _check_whole(manifest: pb.WeightsManifest, size: int, digest: str) -> None:
    if size != manifest.size:
        raise FailedPreconditionError(f"{size} of {manifest.size} bytes are here; upload the rest before the commit")
    if digest != manifest.digest:
        raise ChecksumError("the payload does not have manifest.digest; abort and send it again")


def _tensors_in(path: Path) -> dict[str, Tensor]:
    try:
        return mapped_tensors(path)
    except Exception as error:
        raise InvalidArgumentError(f"the payload is not a safetensors file ({error})") from None


def _pieces(url: str) -> Iterator[bytes]:
    """What a URL holds. HTTP goes to no metadata service, wherever it is redirected."""
    if url.startswith(("http://", "https://")):
        with fetched(url) as pieces:
            yield from pieces
        return
    with fsspec.open(url, "rb") as source:
        while data := source.read(8 * 1024 * 1024):
            yield data
