"""Decoders for architectures that nothing faster computes rightly: the model's own code, one sample at a time.

`cached`: every row has the cache that the model makes itself, whatever its layers keep there. Otherwise the whole row
is computed again for every token. An encoder-decoder has what its encoder made of the prompt, and the decoder's cache.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from services.policy.engines.attention import DecodeStep, PrefillStep
from services.policy.engines.decoded import Decoded, LastHidden
from services.policy.engines.kv_cache import KVCache
from services.policy.engines.weights import WeightStore, attach_parameters
from steersman.errors import UnsupportedError
from steersman.nn.encoder_decoder import start_token


class RowCache(KVCache):
    """What each row has seen: its tokens, and the model's own cache of all but those that are still to be fed."""

    def __init__(self, budget: int, max_rows: int) -> None:
        super().__init__(budget, max_rows)
        self.seen: dict[int, tuple[list[int], Any]] = {}

    def copy_all(self, source: int, target: int, tokens: int) -> None:
        """Copies a whole row; a model's own cache cannot be cut, so `tokens` is all that the row has seen."""
        if source in self.seen:
            ids, state = self.seen[source]
            self.seen[target] = list(ids), copy.deepcopy(state)
        else:
            self.seen.pop(target, None)

    def forget(self, row: int) -> None:
        self.seen.pop(row, None)

    def clear(self) -> None:
        super().clear()
        self.seen.clear()


class PlainDecoder:
    """See `services.policy.engines.decoder.Decoder`."""

    def __init__(self, model: PreTrainedModel, store: WeightStore, *, cached: bool) -> None:
        self._model = model
        self._cached = cached
        self._seen = LastHidden(model)
        attach_parameters(model, store, held=frozenset())

    def prefill(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> None:
        cache = step.cache
        assert isinstance(cache, RowCache)
        parts = token_ids.split([span.end - span.start for span in step.spans])
        for span, ids in zip(step.spans, parts, strict=True):
            state = None
            if self._cached:
                state = DynamicCache(config=self._model.config)
                self._model(input_ids=ids[None], past_key_values=state, use_cache=True)
            cache.seen[span.row] = ids.tolist(), state

    def score(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> Decoded:
        self.prefill(token_ids, positions, step)
        logits = self._model(input_ids=token_ids[None], use_cache=False).logits[0]
        return Decoded(logits, self._seen.take()[0])

    def decode(self, token_ids: Tensor, positions: Tensor, step: DecodeStep | PrefillStep) -> Decoded:
        cache = step.cache
        assert isinstance(cache, RowCache)
        rows = [self._next(cache, row, token) for row, token in enumerate(token_ids.tolist())]
        return Decoded(torch.cat([row.logits for row in rows]), torch.cat([row.hidden for row in rows]))

    def _next(self, cache: RowCache, row: int, token: int) -> Decoded:
        ids, state = cache.seen.get(row) or ([], DynamicCache(config=self._model.config) if self._cached else None)
        ids = [*ids, token]
        cache.seen[row] = ids, state
        device = self._model.device
        if self._cached:
            output = self._model(
                input_ids=torch.tensor([[token]], device=device), past_key_values=state, use_cache=True
            )
        else:
            output = self._model(input_ids=torch.tensor([ids], device=device), use_cache=False)
        return Decoded(output.logits[:, -1], self._seen.take()[:, -1])


class EncoderDecoder:
    """See `services.policy.engines.decoder.Decoder`. The last token of a prompt comes with the first decode step; then
    the encoder reads the prompt, and the decoder its start token.
    """

    def __init__(self, model: PreTrainedModel, store: WeightStore) -> None:
        self._model: Any = model
        self._start = start_token(model)
        self._seen = LastHidden(model)
        attach_parameters(model, store, held=frozenset())

    def prefill(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> None:
        cache = step.cache
        assert isinstance(cache, RowCache)
        parts = token_ids.split([span.end - span.start for span in step.spans])
        for span, ids in zip(step.spans, parts, strict=True):
            cache.seen[span.row] = ids.tolist(), None

    def score(self, token_ids: Tensor, positions: Tensor, step: PrefillStep) -> Decoded:
        raise UnsupportedError("an encoder-decoder gives no log-probabilities of its prompt; leave prompt_logprobs out")

    def decode(self, token_ids: Tensor, positions: Tensor, step: DecodeStep | PrefillStep) -> Decoded:
        cache = step.cache
        assert isinstance(cache, RowCache)
        rows = [self._next(cache, row, token) for row, token in enumerate(token_ids.tolist())]
        return Decoded(torch.cat([row.logits for row in rows]), torch.cat([row.hidden for row in rows]))

    def _next(self, cache: RowCache, row: int, token: int) -> Decoded:
        ids, state = cache.seen.get(row) or ([], None)
        if state is None:
            ids, token = [*ids, token], self._start
            encoded = self._model.get_encoder()(input_ids=self._ids(ids))
            state = encoded, EncoderDecoderCache(DynamicCache(), DynamicCache())
        cache.seen[row] = ids, state
        encoder_outputs, past = state
        output = self._model(
            encoder_outputs=encoder_outputs, decoder_input_ids=self._ids([token]), past_key_values=past, use_cache=True
        )
        return Decoded(output.logits[:, -1], self._seen.take()[:, -1])

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self._model.device)
