"""Which decoder an architecture gets, decided by computing.

A tiny random model of the same configuration generates through the whole engine with each decoder, the fastest first;
the first whose log-probabilities are those of the model's own forward pass over prompt and answer is taken.
"""

from __future__ import annotations

import copy
import functools
import logging
import queue
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from services.policy.engine import Engine
from services.policy.engines.decoder import DecoderName
from steersman.errors import ConfigError, InternalError
from steersman.generation import Event, GenerationRequest, RequestFailed, SampleFinished, SamplingParams
from steersman.nn.encoder_decoder import is_encoder_decoder, language_model_class
from steersman.nn.parity import NATS, ParityVerdict, SameConfig, changes_at, example_groups, logprobs_of
from steersman.nn.tiny import LENGTH, tiny_model

log = logging.getLogger("steersman.policy")

_NEW_TOKENS = 14


Start = Callable[[PreTrainedModel, DecoderName], Engine]
"""Makes an engine in float32 on the CPU that generates with a decoder."""


def choose_decoder(config: PreTrainedConfig, start: Start) -> tuple[DecoderName, ParityVerdict]:
    """The decoder, and what was measured: `agrees` for those with a shared cache, `plain` for the model's own code.

    Raises:
        ConfigError: no decoder gives the model's log-probabilities; the reason is named.
    """
    name, verdict = engine_verdict(config, start)
    if verdict.outcome == "refused":
        raise ConfigError(f"{type(config).__name__} cannot run on the transformers engine: {verdict.reason}")
    if verdict.outcome == "plain":
        log.warning("%s generates in the plain way, one sample at a time: %s", type(config).__name__, verdict.reason)
    return name, verdict


def engine_verdict(config: PreTrainedConfig, start: Start) -> tuple[DecoderName, ParityVerdict]:
    return _verdict(SameConfig(config), start)


@functools.lru_cache(maxsize=64)
def _verdict(same: SameConfig, start: Start) -> tuple[DecoderName, ParityVerdict]:
    try:
        with torch.autocast("cpu", enabled=False):
            model = tiny_model(language_model_class(same.config), same.config)
            found = _first_that_agrees(model, start, None)
            original = changes_at(same.config)
            if original is not None and found[1].outcome != "agrees":
                short = _first_that_agrees(model, start, LENGTH)
                if short[1].outcome != "refused":
                    reason = f"its rotations change beyond {original} tokens, so its context ends there"
                    found = short[0], replace(short[1], limit=original, reason=reason)
    except ConfigError as error:
        return "uncached", ParityVerdict("refused", float("nan"), error.message)
    return found


def _first_that_agrees(model: PreTrainedModel, start: Start, longest: int | None) -> tuple[DecoderName, ParityVerdict]:
    reason, difference = "", float("nan")
    names: tuple[DecoderName, ...] = ("llama", "generic", "cached", "uncached")
    if is_encoder_decoder(model.config):
        names = ("encoder-decoder",)
    for name in names:
        try:
            difference = difference_of(model, name, start, longest)
        except Exception as error:  # whatever a model's own code raises for what it does not know
            reason = reason or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            continue
        if difference <= NATS:
            fast = name in ("llama", "generic")
            if name == "encoder-decoder":
                reason = "the caches of an encoder-decoder are not shared"
            return name, ParityVerdict("agrees" if fast else "plain", difference, "" if fast else reason)
        reason = f"its log-probabilities differ from those of single rows by {difference:.2g} nats"
    return "uncached", ParityVerdict("refused", difference, reason)


def difference_of(model: PreTrainedModel, name: DecoderName, start: Start, longest: int | None, seed: int = 0) -> float:
    """Largest difference in nats over prompts that share beginnings, of which one has a single token."""
    engine = start(copy.deepcopy(model), name)
    try:
        engine.start()
        return float(differences(engine, model, longest, seed).max())
    finally:
        engine.close()


def differences(
    engine: Engine, model: PreTrainedModel, longest: int | None, seed: int = 0, *, endless: bool = True
) -> np.ndarray:
    """Of every sampled token's log-probability from the model's own: float [N], in nats.

    Args:
        engine: serves the model's weights.
        longest: tokens of prompt and answer; None: beyond every window of a small model.
        endless: answers do not end before their last token. An engine that takes the end token out of the distribution
            for that reports another one, and must be left to end.
    """
    prompts = [prompt.astype(np.int32) for prompt, _ in example_groups(longest, seed)]
    new = _NEW_TOKENS if longest is None else max(1, longest - max(len(prompt) for prompt in prompts))
    params = SamplingParams(max_new_tokens=new, min_new_tokens=new if endless else 0, seed=seed + 1)
    arrived: queue.Queue[Event] = queue.Queue()
    engine.submit(GenerationRequest("check", prompts, params, n=2), arrived.put)
    found = []
    for _ in range(2 * len(prompts)):
        event = arrived.get(timeout=300)
        if isinstance(event, RequestFailed):
            raise event.error
        if not isinstance(event, SampleFinished):
            raise InternalError("the engine sent tokens that nobody asked for")
        with torch.no_grad():
            wanted = logprobs_of(model, prompts[event.prompt_index], event.token_ids).numpy()
        found.append(np.abs(event.logprobs - wanted))
    return np.concatenate(found)
