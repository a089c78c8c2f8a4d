"""What the engine tests share: running requests to their end and the transformers forward as the reference."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from services.policy.engine import Engine, Event, GenerationRequest, RequestFailed, SampleFinished, SamplingParams

TIMEOUT = 120.0
_NO_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here; `make test-gpu` runs this on a machine that has one"
)
CUDA = (pytest.mark.gpu, _NO_CUDA)
"""Marks of what needs a GPU."""


def collect(engine: Engine, request: GenerationRequest) -> tuple[list[Event], dict[tuple[int, int], SampleFinished]]:
    """All events of a request, and its samples by (prompt, sample)."""
    arrived: queue.Queue[Event] = queue.Queue()
    engine.submit(request, arrived.put)
    return gather(arrived, request)


def gather(
    arrived: queue.Queue[Event], request: GenerationRequest
) -> tuple[list[Event], dict[tuple[int, int], SampleFinished]]:
    events: list[Event] = []
    finished: dict[tuple[int, int], SampleFinished] = {}
    while len(finished) < len(request.prompts) * request.n:
        event = arrived.get(timeout=TIMEOUT)
        events.append(event)
        if isinstance(event, RequestFailed):
            raise event.error
        if isinstance(event, SampleFinished):
            assert (event.prompt_index, event.sample_index) not in finished
            finished[event.prompt_index, event.sample_index] = event
    return events, finished


def samples(
    engine: Engine, prompts: Sequence[np.ndarray], params: SamplingParams, n: int = 1
) -> dict[tuple[int, int], SampleFinished]:
    return collect(engine, GenerationRequest("test", prompts, params, n=n))[1]


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 260, length).astype(np.int32) for length in lengths]


@torch.no_grad()
def reference_logprobs(
    model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """Log-probabilities float32 [R] of the response by the transformers forward."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].numpy()
