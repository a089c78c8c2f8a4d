"""Decoding on a GPU as recorded graphs.

A decode step is hundreds of small kernels, and to start them from Python takes several times as long as to run them.
Recorded once as a CUDA graph, they start with one call. A graph has fixed shapes and addresses: rows and tokens are
rounded up, and graphs are forgotten when the cache or the weights lie elsewhere.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.policy.engines.attention import DecodeStep
from services.policy.engines.decoded import Decoded
from services.policy.engines.decoder import Decoder, LlamaDecoder
from services.policy.engines.kv_cache import KVCache

log = logging.getLogger("steersman.policy")

_FEW_ROWS, _MANY_ROWS = 8, 64
_SHORT, _LONG = 64, 1024


def padded_rows(rows: int, most: int) -> int:
    """Powers of two, multiples of 8 from there, of 32 above 64; at most `most`."""
    if rows <= _FEW_ROWS:
        return min(1 << (rows - 1).bit_length(), most)
    step = 8 if rows <= _MANY_ROWS else 32
    return min(-(-rows // step) * step, most)


def padded_length(tokens: int, most: int) -> int:
    """Multiples of 64, of 256 above 1024; at most `most`."""
    step = _SHORT if tokens <= _LONG else 256
    return min(-(-tokens // step) * step, most)


@dataclass(frozen=True, eq=False)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    decoded: Decoded
    """Of all rows; overwritten by the next replay of any graph."""


class DecodeGraphs:
    """Decode steps of one decoder over one cache, from one thread."""

    def __init__(self, decoder: Decoder, cache: KVCache, device: torch.device) -> None:
        self._decoder = decoder
        self._cache = cache
        self._device = device
        # A model's own code may ask the device for numbers on the way, which cannot be recorded.
        self.enabled = device.type == "cuda" and isinstance(decoder, LlamaDecoder)
        self._graphs: dict[tuple[int, int], _Recorded] = {}
        self._storage = -1
        if self.enabled:
            self._inputs = torch.zeros((2, cache.max_rows), dtype=torch.int64, device=device)
            self._stream = torch.cuda.Stream(device)
            self.forget()

    def forget(self) -> None:
        """The weights lie elsewhere now."""
        self._graphs.clear()
        if self.enabled:
            self._pool = torch.cuda.graph_pool_handle()  # memory goes with the last graph that was recorded in it

    def decode(self, token_ids: np.ndarray, positions: np.ndarray) -> Decoded:
        """From int64 [B] last tokens and their places; valid until the next call."""
        rows, longest = len(token_ids), int(positions.max()) + 1
        if not self.enabled:
            places = self._tensor(positions)
            return self._decoder.decode(self._tensor(token_ids), places, DecodeStep(self._cache, places, longest))
        size = padded_rows(rows, self._cache.rows), padded_length(longest, self._cache.capacity)
        given = np.zeros((2, size[0]), np.int64)  # rows that nobody uses write where nobody reads
        given[0, :rows], given[1, :rows] = token_ids, positions
        self._inputs[:, : size[0]].copy_(torch.from_numpy(given))
        if self._storage != self._cache.storage:
            self.forget()
            self._storage = self._cache.storage
        found = self._graphs.get(size) or self._record(size)
        if found is None:
            return self._step(size).first(rows)
        found.graph.replay()
        return found.decoded.first(rows)

    def _step(self, size: tuple[int, int]) -> Decoded:
        token_ids, positions = self._inputs[:, : size[0]]
        return self._decoder.decode(token_ids, positions, DecodeStep(self._cache, positions, size[1]))

    def _record(self, size: tuple[int, int]) -> _Recorded | None:
        """None where nothing can be recorded: the step before has not made the cache's storage yet, or never."""
        if not self._cache.layers:
            return None
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                if not self._graphs:
                    self._step(size)  # libraries make their work space at the first call
                found = self._recording(size)
        finally:
            current.wait_stream(self._stream)
        if found is not None:
            self._graphs[size] = found
        return found

    def _recording(self, size: tuple[int, int]) -> _Recorded | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads prepare weights meanwhile: what they ask of the device does not concern the recording.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                decoded = self._step(size)
            finally:
                graph.capture_end()
        except RuntimeError as error:
            log.warning("decode steps are not recorded as CUDA graphs: %s", str(error).splitlines()[0])
            self.enabled = False
            return None
        return _Recorded(graph, decoded)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self._device)
