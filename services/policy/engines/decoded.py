"""What a decoder gives for every row: logits, and the hidden states that heads beside the model read."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from steersman.nn.forward import trunk_of


class Decoded(NamedTuple):
    """logits [B, V] and the trunk's last hidden states [B, D] that they were made of."""

    logits: Tensor
    hidden: Tensor

    def first(self, rows: int) -> Decoded:
        return Decoded(self.logits[:rows], self.hidden[:rows])


class LastHidden:
    """Remembers what a transformers model's trunk gave last."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._states: Tensor | None = None
        (model.get_decoder() if model.config.is_encoder_decoder else trunk_of(model)).register_forward_hook(self._keep)

    def _keep(self, trunk: nn.Module, given: Any, output: Any) -> None:
        self._states = output.last_hidden_state

    def take(self) -> Tensor:
        """[rows, tokens, D]"""
        assert self._states is not None
        states, self._states = self._states, None
        return states
