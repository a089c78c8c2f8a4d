"""A deterministic engine without a model and without torch, for tests of whatever stands on an engine."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from steersman.errors import InternalError, InvalidArgumentError, SteersmanError, UnavailableError
from steersman.generation import (
    EngineInfo,
    Event,
    FinishReason,
    GenerationRequest,
    PromptScored,
    RequestFailed,
    SampleFinished,
    TokenEvent,
    WeightsUpdate,
)


@dataclass(eq=False)
class _Sample:
    handle: int
    request: GenerationRequest
    on_event: Callable[[Event], None]
    prompt_index: int
    sample_index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class FakeEngine:
    """Draws every token from a hash of (seed, prompt, sample index, position, weights version).

    Implements `services.policy.engine.Engine`. All samples advance by one token a step, so that streaming,
    cancellation and weight swaps behave as with a real engine. A sample ends by chance with `eos_token_id`
    (probability `eos_probability` a token) once `min_new_tokens` are there.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        max_context: int = 512,
        eos_token_id: int = 2,
        eos_probability: float = 0.05,
        seconds_per_step: float = 0.0,
        fail_after_tokens: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.eos_token_id = eos_token_id
        self.eos_probability = eos_probability
        self.seconds_per_step = seconds_per_step
        self.fail_after_tokens = fail_after_tokens
        """Every request fails with InternalError when one of its samples would get longer; None: never."""
        self.updates: list[WeightsUpdate] = []
        self._version = 0
        self._samples: deque[_Sample] = deque()
        self._next_handle = 0
        self._cancelled: set[int] = set()
        self._wake = threading.Condition()
        self._closed = True
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def info(self) -> EngineInfo:
        with self._wake:
            running = len(self._samples)
        return EngineInfo(
            engine="fake",
            model="fake",
            vocab_size=self.vocab_size,
            max_context=self.max_context,
            eos_token_ids=(self.eos_token_id,),
            dtype="float32",
            device="cpu",
            weights_version=self._version,
            running=running,
            waiting=0,
        )

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        request.check(self.vocab_size, self.max_context)
        with self._wake:
            if self._closed:
                raise UnavailableError("the engine is closed, send the request to another replica or later")
            self._next_handle += 1
            self._samples.extend(
                _Sample(self._next_handle, request, on_event, prompt_index, sample_index)
                for prompt_index in range(len(request.prompts))
                for sample_index in range(request.n)
            )
            self._wake.notify()
            return self._next_handle

    def cancel(self, handle: int) -> None:
        with self._wake:
            self._cancelled.add(handle)
            self._wake.notify()

    def load_weights(self, update: WeightsUpdate) -> float:
        if not update.tensors:
            raise InvalidArgumentError("the weights update holds no tensors")
        with self._wake:
            self.updates.append(update)
            self._version = update.version
        return 0.0

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._samples)
                closed, cancelled, self._cancelled = self._closed, self._cancelled, set()
                version, batch = self._version, list(self._samples)
            if closed:
                self._fail({s.handle for s in batch}, UnavailableError("the engine was closed, send the request again"))
                return
            for sample in batch:
                if sample.handle in cancelled:
                    self._finish(sample, "cancelled")
            failed = {s.handle for s in self._samples if len(s.token_ids) == self.fail_after_tokens}
            self._fail(failed, InternalError("the fake engine was told to fail"))
            for sample in list(self._samples):
                try:
                    self._advance(sample, version)
                except Exception as error:
                    self._fail({sample.handle}, InternalError(f"generation failed: {error}"))
            time.sleep(self.seconds_per_step)

    def _advance(self, sample: _Sample, version: int) -> None:
        request, params, position = sample.request, sample.request.params, len(sample.token_ids)
        if sample not in self._samples:
            return
        prompt = request.prompts[sample.prompt_index]
        numbers = (params.seed, request.first_prompt + sample.prompt_index, sample.sample_index, position, version)
        digest = hashlib.sha256(repr(numbers).encode() + np.ascontiguousarray(prompt, np.int32).tobytes()).digest()
        stops = {self.eos_token_id, *params.stop_token_ids}
        allowed = np.ones(self.vocab_size, bool)
        if request.constraint is not None:
            mask = request.constraint(sample.prompt_index, sample.sample_index, tuple(sample.token_ids))
            allowed = allowed if mask is None else mask.copy()
        if position < params.min_new_tokens:
            allowed[list(stops)] = False
        chance = int.from_bytes(digest[:4], "little") / 2**32
        if allowed[self.eos_token_id] and chance < self.eos_probability:
            token = self.eos_token_id
        else:
            choices = np.flatnonzero(allowed)
            token = int(choices[int.from_bytes(digest[4:8], "little") % len(choices)])
        logprob = -float(np.log(self.vocab_size))
        if request.score_prompts and not position and not sample.sample_index:
            rest = prompt[1:, None].astype(np.int32)
            top = (rest + np.arange(params.top_logprobs, dtype=np.int32)) % self.vocab_size
            scores = np.full(top.shape, logprob, np.float32)
            alone = np.full(len(rest), logprob, np.float32)
            sample.on_event(PromptScored(sample.prompt_index, alone, top, scores))
        sample.token_ids.append(token)
        sample.logprobs.append(logprob)
        if version not in sample.versions:
            sample.versions.append(version)
        if request.stream:
            others = tuple(((token + i) % self.vocab_size, logprob) for i in range(params.top_logprobs))
            sample.on_event(TokenEvent(sample.prompt_index, sample.sample_index, token, logprob, version, others))
        if token in stops:
            self._finish(sample, "stop")
        elif len(sample.token_ids) >= params.max_new_tokens or prompt.size + len(sample.token_ids) >= self.max_context:
            self._finish(sample, "length")

    def _finish(self, sample: _Sample, reason: FinishReason) -> None:
        with self._wake:
            self._samples.remove(sample)
        sample.on_event(
            SampleFinished(
                prompt_index=sample.prompt_index,
                sample_index=sample.sample_index,
                token_ids=np.array(sample.token_ids, np.int32),
                logprobs=np.array(sample.logprobs, np.float32),
                finish_reason=reason,
                weights_versions=tuple(sample.versions),
            )
        )

    def _fail(self, handles: set[int], error: SteersmanError) -> None:
        """Removes all samples of the requests and tells each request once."""
        callbacks = {s.handle: s.on_event for s in self._samples if s.handle in handles}
        with self._wake:
            self._samples = deque(s for s in self._samples if s.handle not in handles)
        for on_event in callbacks.values():
            on_event(RequestFailed(error))
