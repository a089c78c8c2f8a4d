"""Whether vLLM computes an architecture as transformers does, decided by computing before its weights are loaded.

vLLM has code of its own for every architecture, and where it computes another function, nothing fails: samples, their
log-probabilities and what is trained on them are of another model. So a small random model of the same configuration
(heads as wide as they are) is served first, and a second one is put in its place, as training publishes weights:

    agrees    the log-probabilities of both are those of transformers (with a limit: of rows up to that length)
    refused   they are not; the reason says by how much
    refused, not computed    vLLM or transformers cannot make the small model, which says nothing about the real one
"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from services.policy.engine import Engine
from services.policy.engines.choice import differences
from steersman.errors import ConfigError, SteersmanError
from steersman.generation import WeightsUpdate
from steersman.nn.encoder_decoder import language_model_class
from steersman.nn.parity import NATS, ParityVerdict, SameConfig, changes_at, example_groups, logprobs_of
from steersman.nn.tiny import LENGTH, tiny_model

log = logging.getLogger("steersman.policy")

_ROUNDINGS = 2.5
"""In bf16 vLLM may differ from transformers, on average, by so many times what rounding moves transformers itself: in a
small random model 0.006 to 0.03 nats, with experts, which a rounding may exchange, up to 0.1."""

Start = Callable[[Path, int | None], Engine]
"""Makes an engine for the model of a folder, whose context ends at a length (None: the model's)."""

_known: dict[tuple[SameConfig, bool], ParityVerdict] = {}


def accepted_context(config: PreTrainedConfig, start: Start, *, exact: bool) -> int | None:
    """Length at which the context must end; None: the model's own.

    Raises:
        ConfigError: vLLM computes the architecture otherwise than transformers.
    """
    name, same = type(config).__name__, (SameConfig(config), exact)
    if same not in _known:
        _known[same] = vllm_verdict(config, start, exact=exact)
    verdict = _known[same]
    if not verdict.computed:
        log.warning("whether vLLM computes %s as transformers does is not known: %s", name, verdict.reason)
    elif verdict.outcome == "refused":
        raise ConfigError(
            f"{name} cannot run on the vllm engine: {verdict.reason}; use the engine transformers, or set "
            "vllm.checkArchitecture to false where that is known to mean nothing"
        )
    elif verdict.limit:
        log.warning("vLLM: the context of %s ends at %d tokens: %s", name, verdict.limit, verdict.reason)
    return verdict.limit


def vllm_verdict(
    config: PreTrainedConfig,
    start: Start,
    *,
    exact: bool,
    afterwards: Callable[[Engine, int | None], None] = lambda engine, longest: None,
) -> ParityVerdict:
    """
    Args:
        exact: the engine computes in float32; otherwise in bf16.
        afterwards: is given the engine that agrees before it is closed, and how long its rows may be.
    """
    try:
        models = [random_model(config, seed) for seed in (0, 1)]
        verdict = _looked_at(models, start, None, exact, afterwards)
        original = changes_at(config)
        if verdict.outcome == "refused" and original is not None:
            short = _looked_at(models, start, LENGTH, exact, afterwards)
            if short.outcome == "agrees":
                reason = f"its rotations change beyond {original} tokens"
                verdict = replace(short, limit=original, reason=reason)
    except Exception as error:  # whatever a model's own code raises
        words = error.message if isinstance(error, SteersmanError) else f"{type(error).__name__}: {error}"
        words = re.sub(r"'\S*/vllm-check-\w+'", "a small model of it", " ".join(words.split()))
        verdict = ParityVerdict("refused", float("nan"), words[:400], computed=False)
    return verdict


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    model = tiny_model(language_model_class(config), config, seed=seed, whole_heads=True)
    model.set_attn_implementation("eager")  # transformers before 5.20 leaves out Gemma 2's cap in its faster attention
    return model


def after_new_weights(engine: Engine, model: PreTrainedModel, longest: int | None, seed: int) -> np.ndarray:
    """`differences` after the model's weights have come as training sends them."""
    version = engine.info().weights_version + 1
    engine.load_weights(WeightsUpdate(version, "full", dict(model.named_parameters())))
    return differences(engine, model, longest, seed, endless=False)


def rounding(model: PreTrainedModel, longest: int | None) -> float:
    """Mean difference in nats that rounding to bf16 makes to a token's log-probability in transformers."""
    groups = example_groups(longest)
    rounded = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        values = [
            torch.cat([logprobs_of(one, prompt, answer) for prompt, answers in groups for answer in answers])
            for one in (model, rounded)
        ]
    return float((values[0] - values[1]).abs().mean())


def _looked_at(
    models: list[PreTrainedModel],
    start: Start,
    longest: int | None,
    exact: bool,
    afterwards: Callable[[Engine, int | None], None],
) -> ParityVerdict:
    first, second = models
    largest = 0.0
    limit = NATS if exact else _ROUNDINGS * max(rounding(model, longest) for model in models)
    with tempfile.TemporaryDirectory(prefix="vllm-check-") as folder:
        first.save_pretrained(folder)
        engine = start(Path(folder), longest)
        try:
            engine.start()
            looks: dict[str, Callable[[], np.ndarray]] = {
                "": lambda: differences(engine, first, longest, endless=False),
                " after new weights": lambda: after_new_weights(engine, second, longest, seed=1),
            }
            for when, look in looks.items():
                found = look()
                difference = float(found.max() if exact else found.mean())
                if not difference <= limit:
                    reason = f"its log-probabilities{when} differ from those of transformers by {difference:.2g} nats"
                    return ParityVerdict("refused", difference, reason)
                largest = max(largest, difference)
            afterwards(engine, longest)
        finally:
            engine.close()
    return ParityVerdict("agrees", largest)
