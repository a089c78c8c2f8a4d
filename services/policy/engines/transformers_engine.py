"""The embedded engine: continuous batching over a transformers model, on CPU and CUDA.

A sample's cache holds all its tokens but the last; every decode step feeds the last token of every running sample.
So a prompt's last token is a decode step like all others, and a sample whose prompt begins like that of a running
one (the n samples of a prompt, a common system prompt) copies the keys and values of what they share and computes
only the rest. The next turn of a conversation finds those of the turns before it in the same way (`prefixes`), and a
single chat on a CPU may draw several tokens a step where it repeats what was said (`lookahead`).

    submit -> waiting -> [admit: cache row, shared prefix, prefill] -> running -> decode steps -> finished
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from transformers import PreTrainedModel

from services.policy.engines.attention import PrefillStep, Span
from services.policy.engines.choice import choose_decoder
from services.policy.engines.decode_graphs import DecodeGraphs
from services.policy.engines.decoder import Decoder, DecoderName, build_decoder
from services.policy.engines.hardware import Precision, resolve_device, resolve_dtype, weight_layout
from services.policy.engines.intake import Intake, Swap
from services.policy.engines.kv_cache import KVCache, row_capacity
from services.policy.engines.lookahead import Lookahead
from services.policy.engines.plain import RowCache
from services.policy.engines.prefixes import PrefixMemory, common_prefix
from services.policy.engines.sampling import Drawn, draw, end_tokens, prompt_scores, stream_key
from services.policy.engines.transformers_samples import ConstraintError, DrawPlan, Sample, deliver, report
from services.policy.engines.weights import Place, WeightStore
from steersman.errors import (
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
    PromptScored,
    RequestFailed,
    TokenEvent,
    WeightsUpdate,
)
from steersman.nn.ilql import AdvantageHeads, HeadTensors, read_heads, split_heads
from steersman.nn.load import context_of, load_causal_lm

logger = logging.getLogger(__name__)

_SHARE_AT_LEAST = 8
"""Shared prompt tokens from which copying pays."""
_SCORED_AT_ONCE = 2**25
"""Logits of a prompt that are held at the same time: 128 MiB."""
_SCORED_AT_ONCE_PLAIN = 2**27
"""Of a prompt that must be computed at once."""


class TransformersEngine:
    """See `services.policy.engine.Engine`.

    Deterministic: with nothing else in flight, the same requests in the same order give the same samples. The
    random numbers of a sample do not depend on its neighbours; its logits do in the last bits, because kernels
    round by batch size.
    """

    def __init__(
        self,
        model: Path | PreTrainedModel,
        *,
        name: str = "policy",
        precision: Precision = "auto",
        device: str = "auto",
        threads: int = 0,
        max_context: int | None = None,
        max_rows: int = 64,
        kv_cache_tokens: int = 16_384,
        prefill_tokens: int = 2_048,
        prefix_tokens: int = 4_096,
        lookahead: bool = False,
        decoder: DecoderName | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            model: folder of a causal language model, or one in memory, which the engine takes apart.
            name: what `info` reports.
            precision: "auto" takes what the device computes faster; on a CPU it is measured.
            device: "auto", "cpu" or "cuda".
            threads: CPU threads; 0: torch's default.
            max_context: longest prompt plus response in tokens; None: the model's.
            max_rows: samples generated at the same time.
            kv_cache_tokens: tokens that the cache holds for all running samples; it bounds the memory.
            prefill_tokens: prompt tokens computed between two decode steps; it bounds how long running samples
                stand still for new ones.
            prefix_tokens: tokens of ended conversations that are remembered for their next turns, beside
                `kv_cache_tokens`; 0: none.
            lookahead: draft the answer of a single chat from its own words, on a CPU; the samples stay the same.
            decoder: None: the fastest that is right for the model, which is found by computing.
            on_death: called from the engine's thread when that ends without `close`.
        """
        self._model: Path | PreTrainedModel | None = model
        self._folder = model if isinstance(model, Path) else None
        self._name = name
        self._precision: Precision = precision
        self._device_name = device
        self._threads = threads
        self._max_context = max_context
        self._cache = KVCache(kv_cache_tokens, max_rows)
        self._prefill_tokens = prefill_tokens
        self._prefixes = PrefixMemory(prefix_tokens)
        self._looks_ahead = lookahead
        self._decoder_name = decoder
        self._on_death = on_death
        self._intake: Intake[Sample] = Intake()
        self._started = False
        self._thread: threading.Thread | None = None
        self._preparing = threading.Lock()
        # The engine's thread only.
        self._waiting: deque[Sample] = deque()
        self._rows: list[Sample] = []
        self._draw: DrawPlan | None = None
        self._version = 0
        self._mask: _MaskPolicy | None = None
        self._heads: AdvantageHeads | None = None
        """Of ILQL; they move the logits of every token."""

    def start(self) -> None:
        if self._model is None:
            raise FailedPreconditionError("the engine was started before; build a new one")
        device = resolve_device(self._device_name)
        dtype = resolve_dtype(self._precision, device)
        if self._threads:
            torch.set_num_threads(self._threads)
        model = load_causal_lm(self._model, dtype="auto") if isinstance(self._model, Path) else self._model
        heads = read_heads(self._model) if isinstance(self._model, Path) else {}
        self._model = None
        text = model.config.get_text_config(decoder=True)
        name, context = self._decoder_name, context_of(text)
        if name is None:
            name, verdict = choose_decoder(model.config, with_decoder)
            context = verdict.limit or context
        self._plain = name in ("cached", "uncached", "encoder-decoder")
        if self._plain:  # a model's own cache cannot be cut, and knows one token a step
            self._cache = RowCache(self._cache.budget, self._cache.max_rows)
            self._prefixes, self._looks_ahead = PrefixMemory(0), False
        self._vocab: int = text.vocab_size
        self._context = min(self._max_context or context, context)
        self._eos = end_tokens(model.generation_config, text)
        self._chosen = name
        self._device, self._dtype = device, dtype
        self._looks_ahead &= device.type == "cpu"  # a GPU's recorded steps have one token a row
        self._hidden_size: int = getattr(text, "hidden_size", 0)
        self._heads = self._prepared(heads)
        model.requires_grad_(False).eval().to(device)
        with torch.no_grad():
            self._decoder, self._store = build_decoder(model, name, dtype, weight_layout(device, dtype))
        self._graphs = DecodeGraphs(self._decoder, self._cache, device)
        self._intake.open()
        self._started = True
        self._thread = threading.Thread(target=self._run, name="transformers-engine", daemon=True)
        self._thread.start()

    def _prepared(self, heads: HeadTensors) -> AdvantageHeads | None:
        """Heads that compute as the model does; None where there are none."""
        if not heads:
            return None
        return AdvantageHeads.of(heads, self._hidden_size, self._vocab).to(self._device, self._dtype)

    def _must_be_started(self) -> None:
        if not self._started:
            raise UnavailableError("the model is still being loaded; try again")

    def close(self) -> None:
        self._intake.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def info(self) -> EngineInfo:
        self._must_be_started()
        rows, waiting = list(self._rows), len(self._waiting) + self._intake.waiting
        return EngineInfo(
            engine="transformers",
            model=self._name,
            vocab_size=self._vocab,
            max_context=self._context,
            eos_token_ids=tuple(sorted(self._eos)),
            dtype=str(self._dtype).removeprefix("torch."),
            device=str(self._device),
            weights_version=self._version,
            running=len(rows),
            waiting=waiting,
            details={
                "kv_cache_tokens": float(self._cache.budget),
                "kv_cache_tokens_used": float(sum(row.length for row in rows)),
                "prefix_tokens_used": float(self._prefixes.used),
            },
        )

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        self._must_be_started()
        request.check(self._vocab, self._context)
        if request.params.mask_top_p < 1.0 and self._mask is None:
            raise FailedPreconditionError("sampling.mask_top_p is set, but no mask policy is loaded; publish one first")
        if request.score_prompts:
            self._check_scored(request)
        samples = [
            self._sample(request, on_event, prompt_index, sample_index)
            for prompt_index in range(len(request.prompts))
            for sample_index in range(request.n)
        ]
        largest = max(samples, key=lambda sample: sample.cache_tokens)
        if row_capacity(largest.cache_tokens) > self._cache.budget:
            raise InvalidArgumentError(
                f"prompts[{largest.prompt_index}] with {len(largest.prompt)} tokens and max_new_tokens {largest.limit} "
                f"does not fit the key-value cache of {self._cache.budget} tokens; "
                "ask for fewer tokens or raise kvCacheTokens"
            )
        return self._intake.submit(samples)

    def _check_scored(self, request: GenerationRequest) -> None:
        if self._chosen == "encoder-decoder":
            raise UnsupportedError("an encoder-decoder gives no log-probabilities of its prompt; leave them out")
        most = _SCORED_AT_ONCE_PLAIN // self._vocab
        longest = max(map(len, request.prompts))
        if self._plain and longest > most:
            raise InvalidArgumentError(
                f"a prompt has {longest} tokens; this model gives log-probabilities of {most} at most; shorten it"
            )

    def _sample(
        self, request: GenerationRequest, on_event: Callable[[Event], None], prompt_index: int, sample_index: int
    ) -> Sample:
        prompt = request.prompts[prompt_index]
        return Sample(
            handle=0,
            request=request,
            on_event=on_event,
            prompt_index=prompt_index,
            sample_index=sample_index,
            prompt=prompt,
            limit=min(request.params.max_new_tokens, self._context - len(prompt)),
            stops=self._eos.union(request.params.stop_token_ids),
            key=stream_key(request.params.seed, request.first_prompt + prompt_index, sample_index),
        )

    def cancel(self, handle: int) -> None:
        self._intake.cancel(handle)

    def load_weights(self, update: WeightsUpdate) -> float:
        with self._preparing:
            swap = Swap(update.version, self._prepare(update))
            self._intake.swap(swap)
        return swap.seconds

    def _prepare(self, update: WeightsUpdate) -> Place:
        own, of_mask = update.split()
        tensors, of_heads = split_heads(own.tensors)
        heads = self._prepared(of_heads)
        place_weights = self._store.prepare(replace(own, tensors=tensors))

        def place() -> object:
            """Weights and heads come together: an update without heads is of a policy that has none."""
            old = place_weights(), self._heads
            self._heads = heads
            return old

        if of_mask is None:
            return place
        mask = self._mask or self._new_mask()
        place_mask = mask.store.prepare(of_mask)

        def both() -> object:
            old = place(), place_mask()
            if self._mask is None:
                self._mask = mask
                mask.cache.resize(self._cache.capacity or row_capacity(1), 0, 0)
            return old

        return both

    def _new_mask(self) -> _MaskPolicy:
        """The served model once more, with weights and a cache of its own."""
        if self._folder is None:
            raise FailedPreconditionError("an engine of a model in memory has no mask policy; start it from a folder")
        model = load_causal_lm(self._folder, dtype="auto").requires_grad_(False).eval().to(self._device)
        with torch.no_grad():
            layout = weight_layout(self._device, self._dtype)
            decoder, store = build_decoder(model, self._chosen, self._dtype, layout)
        cache = type(self._cache)(self._cache.budget, self._cache.max_rows)
        return _MaskPolicy(decoder, store, cache, DecodeGraphs(decoder, cache, self._device))

    # The engine's thread.

    @property
    def _caches(self) -> list[KVCache]:
        """What holds a row for every running sample."""
        return [self._cache] if self._mask is None else [self._cache, self._mask.cache]

    def _forget_graphs(self) -> None:
        self._graphs.forget()
        if self._mask is not None:
            self._mask.graphs.forget()

    def _copy_row(self, source: int, target: int, tokens: int) -> None:
        for cache in self._caches:
            cache.copy_all(source, target, tokens)

    def _run(self) -> None:
        """The thread: it ends when the engine is closed, or tells everybody that it could not go on."""
        reason = UnavailableError("the engine was closed before the request ended; send it again")
        try:
            self._work()
        except BaseException as error:
            logger.exception("the engine's thread ended")
            reason = UnavailableError(f"the engine has stopped ({error}); send the request to another replica")
        left = self._intake.end()
        self._waiting.extend(left.samples)
        for swap in left.swaps:
            swap.end(reason)
        self._fail({sample.handle for sample in (*self._rows, *self._waiting)}, reason)
        self._forget_graphs()
        self._prefixes.clear()
        for cache in self._caches:
            cache.clear()
        if left.open:
            self._on_death()

    def _work(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while self._receive():
                try:
                    self._admit()
                    if self._rows:
                        self._decode()
                except Exception as error:
                    logger.exception("a generation step failed")
                    failed = (
                        error if isinstance(error, SteersmanError) else InternalError(f"generation failed: {error}")
                    )
                    self._fail({sample.handle for sample in self._rows}, failed)

    def _receive(self) -> bool:
        """Takes over what other threads handed in; waits when there is nothing to do. False when closed."""
        taken = self._intake.take(busy=bool(self._rows or self._waiting))
        self._waiting.extend(taken.samples)
        for swap in taken.swaps:
            if taken.open:
                self._swap(swap)
            else:
                swap.end(UnavailableError("the engine was closed before the weights were in place"))
        if cancelled := taken.cancelled:
            self._finish([(row, "cancelled") for row, sample in enumerate(self._rows) if sample.handle in cancelled])
            for sample in [sample for sample in self._waiting if sample.handle in cancelled]:
                self._waiting.remove(sample)
                report(sample, "cancelled")
        return taken.open

    def _swap(self, swap: Swap) -> None:
        """Puts weights in place. Where that fails, old and new ones may be mixed: nothing may be made with that."""
        start = perf_counter()
        try:
            swap.replaced = swap.place()
        except BaseException as error:
            swap.end(InternalError(f"weights version {swap.version} could not be put in place ({error})"))
            raise
        self._forget_graphs()
        self._prefixes.clear()
        self._version = swap.version
        swap.seconds = perf_counter() - start
        swap.end()

    def _admit(self) -> None:
        """Gives cache rows to waiting samples, first come first served, and computes their prompts."""
        admitted: list[Span] = []
        tokens = 0
        while self._waiting:
            sample = self._waiting[0]
            if not self._make_room(sample):
                break
            span = self._share(sample)
            if admitted and tokens + span.end - span.start > self._prefill_tokens:
                break
            tokens += span.end - span.start
            admitted.append(span)
            self._waiting.popleft()
            sample.prompt_version = self._version
            for cache in self._caches:
                if isinstance(cache, RowCache):
                    cache.forget(len(self._rows))
            self._rows.append(sample)
            self._draw = None
        scored = [span for span in admitted if self._rows[span.row].is_scored]
        computed = [span for span in admitted if span.end > span.start and span not in scored]
        for span in scored:  # before the others, which may take what these have computed
            self._score(span)
        if computed:
            self._prefill(computed)
        for span in admitted:
            if span.end == span.start and span.donor is not None:
                self._copy_row(span.donor, span.row, span.end)

    def _make_room(self, sample: Sample) -> bool:
        """Whether a row for the sample is there, after changing the rows' capacity where that helps."""
        rows = len(self._rows) + 1
        needed = row_capacity(max(one.cache_tokens for one in (*self._rows, sample)))
        if self._cache.capacity >= needed and rows <= self._cache.rows:
            return True
        if rows > self._cache.rows_for(needed):
            return False
        longest = max((row.length for row in self._rows), default=0)
        for cache in self._caches:
            cache.resize(needed, len(self._rows), longest)
        return True

    def _share(self, sample: Sample) -> Span:
        """The prompt tokens to compute, and the running sample whose prompt begins with the others."""
        end = len(sample.prompt) - 1
        if sample.is_scored:  # keys and values that are there already tell no log-probabilities
            return Span(len(self._rows), 0, end)
        donor, shared = None, 0
        for row, other in enumerate(self._rows):
            if other.prompt_version != self._version:
                continue
            if self._plain:  # a model's own cache cannot be cut: only one that holds the prompt and nothing else
                if other.prompt is sample.prompt and not other.token_ids:
                    return Span(len(self._rows), end, end, row if end else None)
                continue
            if other.prompt is sample.prompt:
                return Span(len(self._rows), end, end, row if end else None)
            common = common_prefix(sample.prompt[:end], other.prompt[:-1])
            if common > shared:
                donor, shared = row, common
        if sample.is_chat and self._mask is None:
            known = self._prefixes.longest(sample.prompt[:end])
            if known > max(shared, _SHARE_AT_LEAST):
                self._prefixes.restore(sample.prompt[:known], self._cache, len(self._rows))
                return Span(len(self._rows), known, end)
        if shared < _SHARE_AT_LEAST:
            return Span(len(self._rows), 0, end)
        return Span(len(self._rows), shared, end, donor)

    def _prefill(self, spans: list[Span]) -> None:
        token_ids = np.concatenate([self._rows[span.row].prompt[span.start : span.end] for span in spans])
        positions = np.concatenate([np.arange(span.start, span.end) for span in spans])
        ids, places = self._tensor(token_ids), self._tensor(positions)
        self._decoder.prefill(ids, places, PrefillStep(self._cache, spans, self._device))
        if self._mask is not None:
            self._mask.decoder.prefill(ids, places, PrefillStep(self._mask.cache, spans, self._device))

    def _score(self, span: Span) -> None:
        """Computes a prompt as `_prefill` does, and tells the log-probabilities of its tokens."""
        sample = self._rows[span.row]
        count = sample.request.params.top_logprobs
        ids = self._tensor(sample.prompt)
        width = span.end if self._plain else max(1, _SCORED_AT_ONCE // self._vocab)
        parts = []
        for start in range(0, span.end, max(1, width)):
            part = Span(span.row, start, min(start + width, span.end))
            step = PrefillStep(self._cache, [part], self._device)
            places = torch.arange(part.start, part.end, device=self._device)
            logits, hidden = self._decoder.score(ids[part.start : part.end], places, step)
            if self._heads is not None:
                logits = logits.float() + self._heads(hidden)
            parts.append(prompt_scores(logits, ids[part.start + 1 : part.end + 1], count))
        if self._mask is not None and span.end:
            places = torch.arange(span.end, device=self._device)
            self._mask.decoder.prefill(ids[:-1], places, PrefillStep(self._mask.cache, [span], self._device))
        if not parts:
            parts = [(np.zeros(0, np.float32), np.zeros((0, count), np.int32), np.zeros((0, count), np.float32))]
        chosen, top_ids, top = (np.concatenate(one) for one in zip(*parts, strict=True))
        deliver(sample, PromptScored(sample.prompt_index, chosen, top_ids, top))

    def _decode(self) -> None:
        """One token for every running sample, or several for the only one."""
        if len(self._rows) == 1 and (draft := self._draft(self._rows[0])):
            self._decode_ahead(self._rows[0], draft)
            return
        if self._draw is None:
            self._draw = DrawPlan(self._rows, self._device)
        try:
            how = self._draw.at(self._rows)
        except ConstraintError as broken:
            self._fail({broken.handle}, broken.error)
            return
        lengths = np.array([row.length for row in self._rows])
        token_ids = np.array([row.token_ids[-1] if row.token_ids else row.prompt[-1] for row in self._rows])
        logits, hidden = self._graphs.decode(token_ids, lengths)
        if self._heads is not None:
            logits = logits.float() + self._heads(hidden)
        if self._mask is not None and self._draw.needs_mask:
            how = replace(how, sets=self._draw.sets(self._mask.graphs.decode(token_ids, lengths).logits))
        self._record(draw(logits, how))

    def _draft(self, sample: Sample) -> list[int]:
        if not (self._looks_ahead and self._heads is None and sample.may_look_ahead):
            return []
        if sample.lookahead is None:
            sample.lookahead = Lookahead(sample.prompt)
        return sample.lookahead.draft(sample.token_ids, sample.limit - len(sample.token_ids) - 1)

    def _decode_ahead(self, sample: Sample, draft: list[int]) -> None:
        """The next token, and those after it as long as the draft is what is drawn."""
        before = len(sample.token_ids)
        last = sample.token_ids[-1] if sample.token_ids else int(sample.prompt[-1])
        places = np.arange(sample.length, sample.length + len(draft) + 1)
        step = PrefillStep(self._cache, [Span(0, int(places[0]), int(places[-1]) + 1)], self._device)
        logits = self._decoder.decode(self._tensor(np.array([last, *draft])), self._tensor(places), step).logits
        rows = [sample] * len(places)
        drawn = draw(logits, DrawPlan(rows, self._device).at(rows, np.arange(len(places))))
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        ended: FinishReason | None = None
        for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            ended = self._take(sample, place, token, logprob, drawn)
            if ended is not None or place == len(draft) or token != draft[place]:
                break
        assert sample.lookahead is not None
        sample.lookahead.learn(len(draft), len(sample.token_ids) - before - 1)
        if ended is not None:
            self._finish([(0, ended)])

    def _record(self, drawn: Drawn) -> None:
        """Adds the drawn tokens to their samples, and ends what is at its end."""
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        ended: list[tuple[int, FinishReason]] = []
        for row, (sample, token, logprob) in enumerate(zip(self._rows, tokens, logprobs, strict=True)):
            reason = self._take(sample, row, token, logprob, drawn)
            if reason is not None:
                ended.append((row, reason))
        self._finish(ended)

    def _take(self, sample: Sample, place: int, token: int, logprob: float, drawn: Drawn) -> FinishReason | None:
        """Adds the token drawn at a place to its sample and tells who streams; why the sample ends with it, if so."""
        sample.token_ids.append(token)
        sample.logprobs.append(logprob)
        if not sample.versions or sample.versions[-1] != self._version:
            sample.versions.append(self._version)
        if sample.request.stream:
            count = sample.request.params.top_logprobs
            top = drawn.top(place, count) if count else ()
            event = TokenEvent(sample.prompt_index, sample.sample_index, token, logprob, self._version, top)
            deliver(sample, event)
        if token in sample.stops:
            return "stop"
        return "length" if len(sample.token_ids) == sample.limit else None

    def _finish(self, ended: Sequence[tuple[int, FinishReason]]) -> None:
        """Ends samples, given by rows in ascending order."""
        samples = [(self._rows[row], reason) for row, reason in ended]
        for (row, _), (sample, _) in zip(ended, samples, strict=True):
            # Where weights came in the middle, the row is of several versions.
            if sample.is_chat and sample.sample_index == 0 and sample.versions == [self._version]:
                seen = np.concatenate([sample.prompt, sample.token_ids[:-1]]).astype(np.int32)
                if sample.prompt_version == self._version:
                    self._prefixes.keep(seen, self._cache, row)
        for row, _ in reversed(ended):
            self._drop(row)
        for sample, reason in samples:
            report(sample, reason)

    def _drop(self, row: int) -> None:
        """Frees a row; the last one moves into its place, so that the rows in use stay together."""
        last = self._rows.pop()
        if row < len(self._rows):
            self._copy_row(len(self._rows), row, last.length)
            self._rows[row] = last
        self._draw = None

    def _fail(self, handles: set[int], error: SteersmanError) -> None:
        """Ends whole requests with one error each."""
        failed: dict[int, Sample] = {}
        for row in reversed(range(len(self._rows))):
            if self._rows[row].handle in handles:
                failed[self._rows[row].handle] = self._rows[row]
                self._drop(row)
        for sample in [sample for sample in self._waiting if sample.handle in handles]:
            failed[sample.handle] = sample
            self._waiting.remove(sample)
        for handle in sorted(failed):
            deliver(failed[handle], RequestFailed(error))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self._device)


@dataclass(frozen=True, eq=False)
class _MaskPolicy:
    """An older version of the policy, which reads along and says which tokens may be drawn."""

    decoder: Decoder
    store: WeightStore
    cache: KVCache
    graphs: DecodeGraphs


def with_decoder(model: PreTrainedModel, decoder: DecoderName) -> TransformersEngine:
    """In float32 on the CPU, to be compared with the model itself; see `choice`."""
    return TransformersEngine(model, precision="fp32", device="cpu", decoder=decoder)
