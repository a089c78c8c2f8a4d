"""Which way of computing an architecture allows, decided by computing; no flag of a library is believed.

A tiny random model of the same configuration (`tiny.py`) runs through the very functions that training and services
use, on rows shorter and longer than its windows, and must give the log-probabilities and the gradients of its own
plain forward pass of each row alone:

    agrees    without padding, prompts shared
    plain     the model's own code on rows of equal length: slower
    refused   neither; the reason is one sentence
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from steersman.errors import ConfigError
from steersman.nn.dropout import disable_dropout
from steersman.nn.encoder_decoder import (
    answer_logits,
    is_encoder_decoder,
    language_model_class,
    refuse_encoder_decoder,
)
from steersman.nn.forward import Way, is_decoder, predicting_states, run_without_padding, unwrapped, use
from steersman.nn.head import OutputHead
from steersman.nn.packed import pack
from steersman.nn.tiny import CHANGING_ROTATIONS, LENGTH, VOCABULARY, tiny_model

log = logging.getLogger("steersman.parity")

Outcome = Literal["agrees", "plain", "refused"]
Group = tuple[np.ndarray, list[np.ndarray]]

NATS = 1e-3
"""Largest difference of a token's log-probability, or of a score, that rounding explains in a tiny model in fp32."""
_MOST_TO_COPY = 1_000_000_000
"""Parameters of a model that is checked itself where no small one can be built."""
SLOPE = 5e-3
"""Largest difference of a gradient, relative to the largest one of the model."""


@dataclass(frozen=True, slots=True)
class ParityVerdict:
    outcome: Outcome
    difference: float = 0.0
    """Largest one of a log-probability or score, of the way that is taken (refused: of the last that was tried)."""
    reason: str = ""
    """Why it is not the fast way, or not at all."""
    limit: int | None = None
    """Tokens of a row up to which it holds; None: all."""
    computed: bool = True
    """False: nothing was, because no small model could be built."""

    @property
    def way(self) -> Way:
        return "packed" if self.outcome == "agrees" else "plain"


def choose_forward(model: nn.Module) -> ParityVerdict:
    """Makes `predicting_states` run a decoder (PEFT-wrapped or not) the way that its architecture allows, in place.

    Raises:
        ConfigError: it allows none; the reason is named.
    """
    verdict = _accepted(model)
    use(model, verdict.way, verdict.limit)
    return verdict


def skip_padding(model: nn.Module) -> ParityVerdict:
    """Makes a model ready for right-padded rows, in place: a decoder's trunk skips padding (or takes rows of equal
    length), an encoder stays as it is where padding changes nothing.

    Raises:
        ConfigError: the architecture allows no way; the reason is named.
    """
    verdict = _accepted(model)
    if is_encoder_decoder(unwrapped(model).config):
        use(model, verdict.way, verdict.limit)
    elif is_decoder(model):
        run_without_padding(model, verdict.way, verdict.limit)
    return verdict


def causal_verdict(config: PreTrainedConfig) -> ParityVerdict:
    """Of a causal language model: log-probabilities, gradients, padded batches, balance losses."""
    return _verdict(SameConfig(config), "causal")


def score_verdict(config: PreTrainedConfig) -> ParityVerdict:
    """Of a sequence classifier, decoder or encoder: scores and gradients."""
    return _verdict(SameConfig(config), "score")


_MEANS_NOTHING = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
}


class SameConfig:
    """A configuration, equal to others that make the same model."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        ignored = (
            "_name_or_path",
            "architectures",
            "dtype",
            "torch_dtype",
            "transformers_version",
            "quantization_config",
        )
        values = {name: value for name, value in config.to_dict().items() if name not in ignored}
        self.key = type(config).__name__ + repr(sorted(values.items(), key=lambda item: item[0]))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameConfig) and other.key == self.key


@functools.lru_cache(maxsize=64)
def _verdict(same: SameConfig, kind: Literal["causal", "score"]) -> ParityVerdict:
    check = _check_causal if kind == "causal" else _check_scores
    auto = language_model_class(same.config) if kind == "causal" else AutoModelForSequenceClassification
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        with torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.enable_grad():
            if kind == "score":
                refuse_encoder_decoder(same.config, "a reward model is made of a decoder or an encoder")
            model = tiny_model(auto, same.config)
            verdict = _first_that_agrees(model, check, longest=None)
            original = changes_at(same.config)
            if verdict.outcome != "agrees" and original is not None:
                short = _first_that_agrees(model, check, longest=LENGTH)
                if short.outcome != "refused":
                    reason = f"its rotations change beyond {original} tokens, so rows end there"
                    verdict = replace(short, limit=original, reason=reason)
    except ConfigError as error:
        verdict = ParityVerdict("refused", float("nan"), error.message, computed=False)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
    return verdict


def _accepted(model: nn.Module) -> ParityVerdict:
    base = unwrapped(model)
    name, causal = type(base).__name__, is_decoder(model) and not hasattr(base, "score")
    verdict = (causal_verdict if causal else score_verdict)(base.config)
    if not verdict.computed and sum(one.numel() for one in base.parameters()) <= _MOST_TO_COPY:
        plain = copy.deepcopy(base).float().cpu().eval().requires_grad_(True)
        verdict = _first_that_agrees(plain, _check_causal if causal else _check_scores, longest=None)
    if verdict.outcome == "refused":
        raise ConfigError(f"{name} cannot be used: {verdict.reason}")
    if verdict.outcome == "plain":
        log.warning("%s runs in the plain way, which is slower: %s", name, verdict.reason)
    return verdict


def changes_at(config: PreTrainedConfig) -> int | None:
    """Length behind which a model's rotations depend on the longest row of a batch."""
    text = config.get_text_config(decoder=True)
    rotations = getattr(text, "rope_parameters", None) or {}
    for one in (rotations, *(value for value in rotations.values() if isinstance(value, dict))):
        if one.get("rope_type") in CHANGING_ROTATIONS:
            original = one.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return int(original or text.max_position_embeddings)
    return None


Check = Callable[[PreTrainedModel, Way, int | None], float]


def _first_that_agrees(model: PreTrainedModel, check: Check, longest: int | None) -> ParityVerdict:
    reason, difference = "", float("nan")
    for way, outcome in (("packed", "agrees"), ("plain", "plain")):
        if way == "packed" and is_encoder_decoder(model.config):
            reason = "an encoder-decoder's prompts and answers are padded"
            continue
        if way == "packed" and not is_decoder(model):
            way = "plain"  # an encoder's own padded batches
        try:
            difference = check(model, way, longest)  # type: ignore[arg-type]
        except _Disagreement as found:
            reason, difference = str(found), found.difference
        except Exception as error:  # whatever a model's own code raises for what it does not know
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        else:
            return ParityVerdict(outcome, difference, reason if outcome == "plain" else "")  # type: ignore[arg-type]
    return ParityVerdict("refused", difference, reason)


class _Disagreement(Exception):
    def __init__(self, what: str, difference: float, unit: str) -> None:
        super().__init__(f"{what} differ from those of single rows by {difference:.2g}{unit}")
        self.difference = difference


def example_groups(longest: int | None = None, seed: int = 0) -> list[Group]:
    """Prompts with answers, in all lengths up to 30 tokens (or `longest`): empty answers, one token, past a window."""
    draw = np.random.default_rng(seed)
    shape = [(3, (4, 0, 20)), (13, (2, 9, 17)), (1, (5,)), (6, (6,))]
    if longest is not None:
        shape = [(3, (4, 0, longest - 3)), (longest - 6, (2, 6)), (1, (5,))]
    return [
        (draw.integers(5, VOCABULARY - 2, prompt), [draw.integers(5, VOCABULARY - 2, answer) for answer in answers])
        for prompt, answers in shape
    ]


def _check_causal(model: PreTrainedModel, way: Way, longest: int | None) -> float:
    """Largest difference in nats; raises _Disagreement."""
    groups = example_groups(longest)
    wanted, slopes = alone(model, groups)
    found, found_slopes = _together(model, groups, way)
    difference = _same_numbers("its log-probabilities", found, wanted)
    _same_slopes(found_slopes, slopes)
    if is_encoder_decoder(model.config):  # their padded batches are the way that was just checked
        return difference
    _same_numbers("its log-probabilities in padded batches", _in_padded_batch(model, groups, way), wanted)
    if getattr(model.config.get_text_config(), "router_aux_loss_coef", None):
        _same_balance_loss(model, groups, way)
    return difference


def _same_numbers(what: str, found: Tensor, wanted: Tensor) -> float:
    difference = float((found - wanted).detach().abs().max())
    if not difference <= NATS:
        raise _Disagreement(what, difference, " nats")
    return difference


def _same_slopes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    largest = max((float(one.abs().max()) for one in wanted.values()), default=0.0)
    for name, one in wanted.items():
        other = found.get(name, torch.zeros(()))
        difference = float((other - one).abs().max()) / max(largest, 1e-30)
        if not difference <= SLOPE:
            raise _Disagreement(f"the gradients of {name}", difference, " of the largest gradient")


def logprobs_of(model: PreTrainedModel, prompt: np.ndarray, answer: np.ndarray) -> Tensor:
    """fp32 [R] of the tokens of one answer by the model itself, with a graph."""
    ids = [torch.from_numpy(part.astype(np.int64)) for part in (prompt, answer)]
    return answer_logits(model, *ids).float().log_softmax(-1).gather(1, ids[1][:, None])[:, 0]


def alone(model: PreTrainedModel, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of all answers and gradients of their weighted sum, row by row through the model itself."""
    model.zero_grad(set_to_none=True)
    values = torch.cat([logprobs_of(model, prompt, answer) for prompt, answers in groups for answer in answers])
    return values.detach(), _slopes(model, values)


def _together(model: PreTrainedModel, groups: Sequence[Group], way: Way) -> tuple[Tensor, dict[str, Tensor]]:
    """The same as training computes it."""
    trained = _as_trained(model)
    use(trained, way)
    batch = pack(groups)
    values, _ = OutputHead(trained).token_logprobs(predicting_states(trained, batch), batch.targets)
    return values.detach(), _slopes(trained, values)


def _in_padded_batch(model: PreTrainedModel, groups: Sequence[Group], way: Way) -> Tensor:
    trained = _as_trained(model)
    run_without_padding(trained, way)
    return of_padded_batch(trained, groups)


def of_padded_batch(trained: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Log-probabilities of all answers from one padded batch."""
    rows = [(prompt, answer) for prompt, answers in groups for answer in answers]
    ids, mask = _padded([np.concatenate(row) for row in rows])
    with torch.no_grad():
        table = trained(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
    return torch.cat(
        [
            table[index, torch.arange(len(answer)) + len(prompt) - 1, torch.from_numpy(answer)]
            for index, (prompt, answer) in enumerate(rows)
        ]
    )


@torch.no_grad()
def _same_balance_loss(model: PreTrainedModel, groups: Sequence[Group], way: Way) -> None:
    """The loss of a mixture of experts with its balance term, of one padded batch."""
    ids, mask = _padded([prompt for prompt, _ in groups])
    labels = ids.masked_fill(mask == 0, -100)
    options = {"attention_mask": mask, "labels": labels, "output_router_logits": True}
    wanted = copy.deepcopy(model)(input_ids=ids, **options).loss
    trained = _as_trained(model)
    run_without_padding(trained, way)
    _same_numbers("its balance losses", trained(input_ids=ids, **options).loss, wanted)


def _check_scores(model: PreTrainedModel, way: Way, longest: int | None) -> float:
    def ready(trained: nn.Module) -> None:
        if is_decoder(trained):
            run_without_padding(trained, way)

    return score_difference(model, example_groups(longest), ready)


def score_difference(model: PreTrainedModel, groups: Sequence[Group], ready: Callable[[nn.Module], object]) -> float:
    """Largest difference between scores of a padded batch, after `ready`, and of single rows; raises _Disagreement."""
    from steersman.nn.reward import head_outputs

    rows = [np.concatenate([prompt, answer]) for prompt, answers in groups for answer in answers]
    model.zero_grad(set_to_none=True)
    wanted = torch.cat([model(input_ids=torch.from_numpy(row)[None]).logits for row in rows])
    slopes = _slopes(model, wanted.flatten())
    trained = _as_trained(model)
    ready(trained)
    found = head_outputs(trained, *_padded(rows))
    found_slopes = _slopes(trained, found.flatten())
    difference = _same_numbers("its scores", found, wanted)
    _same_slopes(found_slopes, slopes)
    return difference


def _as_trained(model: PreTrainedModel) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # a verdict draws no random number of the caller's, known already or not
        trained = type(model)(copy.deepcopy(model.config))  # no copy: some models keep what they computed last
    trained.load_state_dict(model.state_dict())
    disable_dropout(trained)
    return trained.train()


def _slopes(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def _padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def describe(verdict: ParityVerdict, name: str) -> str:
    """One line for people."""
    if verdict.outcome == "refused":
        return f"{name} cannot be used: {verdict.reason}"
    way = "without padding" if verdict.outcome == "agrees" else f"in the plain way, which is slower ({verdict.reason})"
    limit = f", rows up to {verdict.limit:,} tokens" if verdict.limit else ""
    return f"{name} runs {way}{limit}; log-probabilities agree to {verdict.difference:.1g} nats"
