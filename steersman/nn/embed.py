"""Texts as vectors: the last hidden states of an encoder, or of a decoder's trunk, pooled over a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from steersman.errors import ConfigError, ContextLengthError, InvalidArgumentError
from steersman.nn.load import context_of, load_tokenizer, load_trunk
from steersman.nn.render import text_ids
from steersman.nn.reward import batches_of, pad_rows

Pooling = Literal["mean", "first", "last"]


class Embedder:
    """A model that stays as it was loaded, so that its vectors can be compared for as long as it runs."""

    def __init__(
        self,
        folder: Path,
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        precision: Literal["fp32", "bf16"] = "fp32",
        device: str = "cpu",
        batch_tokens: int = 8192,
    ) -> None:
        """Raises NotFoundError or ConfigError where the folder holds no such model."""
        self._model = load_trunk(folder, dtype=precision, device=device)
        if getattr(self._model.config, "is_encoder_decoder", False):
            raise ConfigError(f"{folder}: an encoder-decoder has no vector of a text; use an encoder or a decoder")
        self._tokenizer = load_tokenizer(folder)
        self._pooling: Pooling = pooling
        self._normalize = normalize
        self._device = device
        self._batch_tokens = batch_tokens
        config = self._model.config.get_text_config()
        self._vocab: int = config.vocab_size
        self.size: int = config.hidden_size
        """Components of a vector."""
        # RoBERTa's positions begin behind that of padding.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type and config.pad_token_id is not None else 0
        self._context = context_of(config) - offset

    def ids(self, index: int, given: str | Sequence[int]) -> list[int]:
        """Token ids of an input; no text becomes a control token.

        Raises:
            InvalidArgumentError, ContextLengthError: it is empty, too long, or has ids that the model does not know.
        """
        ids = text_ids(self._tokenizer, given) if isinstance(given, str) else list(given)
        if not given or not ids:
            raise InvalidArgumentError(f"inputs[{index}] is empty; send a text", details={"param": "input"})
        if len(ids) > self._context:
            raise ContextLengthError(
                f"inputs[{index}] has {len(ids)} tokens, the model takes {self._context}; shorten it",
                details={"param": "input"},
            )
        if not isinstance(given, str) and max(ids) >= self._vocab:
            raise InvalidArgumentError(
                f"inputs[{index}] has the token {max(ids)}, the model knows {self._vocab}; use its own tokenizer",
                details={"param": "input"},
            )
        return ids

    @torch.inference_mode()
    def vectors(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [N, size] of rows of token ids; a row's vector does not depend on the others but for rounding."""
        found = np.empty((len(rows), self.size), dtype=np.float32)
        for batch in batches_of(rows, self._batch_tokens, decoder=False):
            ids, mask = pad_rows([rows[index] for index in batch], 0, self._device)
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            found[batch] = self._pooled(hidden.float(), mask).cpu().numpy()
        if not np.isfinite(found).all():
            raise InvalidArgumentError("the model gives vectors that are not finite; use another one, or fp32")
        return self._scaled(found)

    def cut(self, vectors: np.ndarray, dimensions: int) -> np.ndarray:
        """The first components of every vector, of length 1 again where vectors have that."""
        if dimensions > self.size:
            raise InvalidArgumentError(
                f"dimensions is {dimensions}, the model has {self.size}; ask for fewer", details={"param": "dimensions"}
            )
        return self._scaled(vectors[:, :dimensions]) if dimensions else vectors

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self._pooling == "first":
            return hidden[:, 0]
        if self._pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        weight = mask.unsqueeze(-1).float()
        return (hidden * weight).sum(1) / weight.sum(1)

    def _scaled(self, vectors: np.ndarray) -> np.ndarray:
        if not self._normalize:
            return vectors
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
