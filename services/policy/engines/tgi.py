"""Compatibility engine: a Text Generation Inference server behind `huggingface_hub.AsyncInferenceClient`.

The server takes text, so a prompt's token ids are decoded and must encode to the same ids again; a prompt for which
they do not is refused, because its samples would not be of the policy that the trainer computes. Weights cannot be
replaced in a running server.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import httpx2
import numpy as np
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import OverloadedError, TextGenerationError, ValidationError
from transformers import AutoTokenizer

from services.policy.engines.in_flight import InFlight
from services.policy.engines.sampling import stream_key
from steersman.errors import (
    ConfigError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    SteersmanError,
    UnavailableError,
    UnsupportedError,
)
from steersman.generation import (
    EngineInfo,
    Event,
    FinishReason,
    GenerationRequest,
    SampleFinished,
    TokenEvent,
    WeightsUpdate,
)
from steersman.loop_thread import LoopThread
from steersman.net import guard_hub, guarded_sync_client

logger = logging.getLogger(__name__)

LOGPROBS_NOTE = "of the distribution after temperature, top-k and top-p, as the server reports it"
_STREAMS = 64
"""Samples generated at the same time; others wait here."""


@dataclass(eq=False)
class _Request(InFlight):
    texts: list[str]


class TgiEngine:
    """See `services.policy.engine.Engine`; one HTTP stream for every sample."""

    def __init__(
        self, url: str, tokenizer: Path, *, name: str = "policy", on_death: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            url: of the server, for example "http://tgi:8080".
            tokenizer: folder of the served model's tokenizer.
            name: what `info` reports.
            on_death: called from the engine's thread when that ends without `close`.
        """
        self._url = url.rstrip("/")
        self._tokenizer_folder = tokenizer
        self._name = name
        self._on_death = on_death
        self._requests: dict[int, _Request] = {}
        self._next_handle = 0
        self._running = 0
        self._lock = threading.Lock()
        self._loop: LoopThread | None = None

    def start(self) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self._tokenizer_folder)
        try:
            with guarded_sync_client(timeout=30) as client:
                answer = client.get(f"{self._url}/info").raise_for_status().json()
            self._context = int(answer["max_total_tokens"])
        except httpx.HTTPError as error:
            raise UnavailableError(f"the TGI server {self._url} does not answer ({error}); check tgi.url") from error
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{self._url}/info is not that of a TGI server ({error}); check tgi.url") from error
        eos = self._tokenizer.eos_token_id
        self._eos = frozenset() if eos is None else frozenset([eos])
        guard_hub()
        self._client = AsyncInferenceClient(model=self._url)
        self._slots = asyncio.Semaphore(_STREAMS)
        self._loop = LoopThread("tgi-engine", self._ended)

    def close(self) -> None:
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()

    def _ended(self, cause: BaseException | None) -> None:
        error = UnavailableError("the engine was closed before the request ended; send it again")
        if cause is not None:
            error = UnavailableError(f"the engine has stopped ({cause!r}); send the request to another replica")
        for one in self._requests.values():
            one.fail(error)
        if cause is not None:
            self._on_death()

    def info(self) -> EngineInfo:
        waiting = sum(len(one.tasks) for one in list(self._requests.values())) - self._running
        return EngineInfo(
            engine="tgi",
            model=self._name,
            vocab_size=len(self._tokenizer),
            max_context=self._context,
            eos_token_ids=tuple(self._eos),
            dtype="unknown",
            device="remote",
            weights_version=0,
            running=self._running,
            waiting=max(waiting, 0),
            logprobs_note=LOGPROBS_NOTE,
        )

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        request.check(len(self._tokenizer), self._context)
        if request.params.presence_penalty or request.params.frequency_penalty or request.params.logit_bias:
            raise InvalidArgumentError(
                "the tgi engine does not know sampling.presence_penalty, frequency_penalty and logit_bias; "
                "use the transformers engine"
            )
        if request.params.mask_top_p < 1.0:
            raise InvalidArgumentError(
                "the tgi engine has no mask policy (sampling.mask_top_p); use the transformers engine"
            )
        if request.score_prompts:
            raise UnsupportedError(
                "the tgi engine streams no log-probabilities of a prompt; use the transformers or vllm engine"
            )
        if request.constraint is not None or request.params.min_new_tokens:
            what = "a token constraint" if request.constraint is not None else "sampling.min_new_tokens"
            raise InvalidArgumentError(f"the tgi engine does not know {what}; use the transformers engine")
        texts = [self._text(index, prompt) for index, prompt in enumerate(request.prompts)]
        with self._lock:
            if self._loop is None:
                raise UnavailableError("the engine is closed; send the request to another replica")
            self._next_handle += 1
            handle, one = self._next_handle, _Request(request, on_event, texts)
            self._loop.begin(self._begin(handle, one), lambda error: one.fail(_translate(error, self._url)))
        return handle

    def _text(self, index: int, prompt: np.ndarray) -> str:
        text: str = self._tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for special in (True, False):  # the server's tokenizer may add a begin-of-sequence token by itself
            encoded = self._tokenizer.encode(text, add_special_tokens=special)
            if encoded == prompt.tolist():
                return text
        bos = self._tokenizer.bos_token or ""
        if text.startswith(bos) and self._tokenizer.encode(text.removeprefix(bos)) == prompt.tolist():
            return text.removeprefix(bos)
        raise InvalidArgumentError(
            f"prompts[{index}] does not survive decoding and encoding, which the tgi engine needs; "
            "use the transformers or vllm engine"
        )

    def cancel(self, handle: int) -> None:
        with self._lock, suppress(UnavailableError):  # the thread has died, and every request with it
            if self._loop is not None:
                self._loop.begin(self._cancel(handle))

    def load_weights(self, update: WeightsUpdate) -> float:
        raise FailedPreconditionError(
            "a TGI server cannot load new weights while it runs; release the model as a new revision, "
            "or train against the transformers or vllm engine"
        )

    # On the event loop.

    async def _begin(self, handle: int, one: _Request) -> None:
        self._requests[handle] = one
        for prompt_index in range(len(one.texts)):
            for sample_index in range(one.request.n):
                one.begin(self._sample(one, prompt_index, sample_index))
        await asyncio.wait(one.tasks)
        del self._requests[handle]

    async def _cancel(self, handle: int) -> None:
        one = self._requests.get(handle)
        if one is not None:
            one.cancelled = True
            for task in one.tasks:
                task.cancel()

    async def _sample(self, one: _Request, prompt_index: int, sample_index: int) -> None:
        token_ids: list[int] = []
        logprobs: list[float] = []
        reason: FinishReason | None = None
        try:
            async with self._slots:
                self._running += 1
                try:
                    reason = await self._stream(one, prompt_index, sample_index, token_ids, logprobs)
                finally:
                    self._running -= 1
        except asyncio.CancelledError:
            if one.ended or not one.cancelled:
                raise
            reason = "cancelled"
        except Exception as error:
            one.fail(_translate(error, self._url))
            return
        one.deliver(
            SampleFinished(
                prompt_index=prompt_index,
                sample_index=sample_index,
                token_ids=np.array(token_ids, np.int32),
                logprobs=np.array(logprobs, np.float32),
                finish_reason=reason,
                weights_versions=(0,) if token_ids else (),
            )
        )

    async def _stream(
        self, one: _Request, prompt_index: int, sample_index: int, token_ids: list[int], logprobs: list[float]
    ) -> FinishReason:
        params = one.request.params
        stops = self._eos.union(params.stop_token_ids)
        limit = min(params.max_new_tokens, self._context - len(one.request.prompts[prompt_index]))
        sampled = params.temperature > 0
        outputs = await self._client.text_generation(
            one.texts[prompt_index],
            details=True,
            stream=True,
            do_sample=sampled,
            temperature=params.temperature if sampled and params.temperature != 1.0 else None,
            top_k=params.top_k if sampled and params.top_k else None,
            top_p=params.top_p if sampled and params.top_p < 1.0 else None,
            top_n_tokens=params.top_logprobs or None,
            seed=int(stream_key(params.seed, one.request.first_prompt + prompt_index, sample_index) >> np.uint64(1)),
            max_new_tokens=limit,
        )
        async with aclosing(outputs) as tokens:  # type: ignore[type-var]
            async for output in tokens:
                token = output.token
                token_ids.append(token.id)
                logprobs.append(token.logprob)
                if one.request.stream:
                    top = tuple((other.id, other.logprob) for other in output.top_tokens or ())
                    one.deliver(TokenEvent(prompt_index, sample_index, token.id, token.logprob, 0, top))
                if token.id in stops:
                    return "stop"
                if output.details is not None:
                    return "length" if output.details.finish_reason == "length" else "stop"
        raise UnavailableError(f"the TGI server {self._url} ended a stream early; try again")


def _translate(error: Exception, url: str) -> SteersmanError:
    if isinstance(error, SteersmanError):
        return error
    if isinstance(error, ValidationError):
        return InvalidArgumentError(f"the TGI server refused the request: {error}")
    if isinstance(error, OverloadedError):
        return UnavailableError(f"the TGI server {url} is overloaded; try again later")
    if isinstance(error, TextGenerationError):
        return InternalError(f"the TGI server {url} failed: {error}")
    if isinstance(error, (httpx2.HTTPError, OSError)):
        return UnavailableError(f"the TGI server {url} cannot be reached: {error}")
    logger.error("a TGI stream failed", exc_info=error)
    return InternalError(f"generation failed: {error}")
