"""Log-probabilities of response tokens under a frozen causal LM, without padding and with shared prompts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from services.reference.config import ReferenceConfig
from steersman.nn.forward import predicting_states
from steersman.nn.hardware import pick_device, pick_precision, set_threads
from steersman.nn.head import OutputHead
from steersman.nn.load import context_of, load_causal_lm, load_tokenizer
from steersman.nn.packed import group_rows, pack
from steersman.nn.parity import choose_forward
from steersman.nn.prepare import resolve_model
from steersman.nn.tokens import tokenizer_fingerprint
from steersman.v1 import common_pb2

log = logging.getLogger("steersman.reference")


@dataclass(frozen=True, eq=False)
class Row:
    """One sample."""

    prompt: np.ndarray
    """int32 [P]"""
    response: np.ndarray
    """int32 [R]"""
    temperature: float

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.response)


class ReferenceEngine:
    def __init__(self, config: ReferenceConfig) -> None:
        self._config = config

    def load(self) -> None:
        """Loads the model; errors name the folder and the mend."""
        config = self._config
        set_threads(config.threads)
        self._device = pick_device(config.device)
        precision = pick_precision(config.precision, self._device)
        folder = resolve_model(config.model, config.cache_dir, note=log.info)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._model = load_causal_lm(folder, dtype=dtype, device=self._device).requires_grad_(False).eval()
        verdict = choose_forward(self._model)
        self._head = OutputHead(self._model)
        text = self._model.config.get_text_config(decoder=True)
        self.info = common_pb2.ModelInfo(
            name=config.model_name,
            tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(folder)),
            vocab_size=text.vocab_size,
            max_context=verdict.limit or context_of(text),
            dtype=precision,
            device=str(self._device),
        )

    @torch.inference_mode()
    def logprobs(self, rows: list[Row]) -> list[np.ndarray]:
        """float32 [R] of every row, in order."""
        results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: rows[index].temperature)
        for temperature, same in groupby(order, key=lambda index: rows[index].temperature):
            indices = list(same)
            groups, packed_order = group_rows(
                [rows[index].prompt for index in indices], [rows[index].response for index in indices]
            )
            batch = pack(groups, self._device)
            states = predicting_states(self._model, batch)
            values, _ = self._head.token_logprobs(states, batch.targets, temperature=temperature)
            parts = torch.split(values, batch.lengths.tolist())
            for part, position in zip(parts, packed_order, strict=True):
                results[indices[position]] = part.cpu().numpy()
        return results
