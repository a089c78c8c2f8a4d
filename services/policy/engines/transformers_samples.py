"""The samples of the transformers engine: their state, what drawing needs of them, what their callers are told."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from services.policy.engines.lookahead import Lookahead
from services.policy.engines.sampling import Draw, Filter, uniforms
from steersman.errors import InternalError, InvalidArgumentError, SteersmanError
from steersman.generation import Event, FinishReason, GenerationRequest, SampleFinished
from steersman.nn.top_p import top_p_sets

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Sample:
    handle: int
    request: GenerationRequest
    on_event: Callable[[Event], None]
    prompt_index: int
    sample_index: int
    prompt: np.ndarray
    limit: int
    """Most tokens of the response: the caller's limit or the end of the context."""
    stops: frozenset[int]
    key: np.uint64
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    prompt_version: int = 0
    """Weights version of the prompt's keys and values."""
    lookahead: Lookahead | None = None

    @property
    def is_chat(self) -> bool:
        """Somebody reads along; otherwise it is a rollout, which must not depend on what was asked before it."""
        return self.request.stream

    @property
    def is_scored(self) -> bool:
        """Whether the prompt's log-probabilities are asked for: once a prompt, by its first sample."""
        return self.request.score_prompts and self.sample_index == 0

    @property
    def may_look_ahead(self) -> bool:
        """Whether several tokens can be drawn at once: nothing restricts one by those before it."""
        params = self.request.params
        return (
            self.is_chat
            and self.request.constraint is None
            and not (params.presence_penalty or params.frequency_penalty or params.mask_top_p < 1.0)
        )

    @property
    def length(self) -> int:
        """Tokens in the cache: all but the last."""
        return len(self.prompt) + len(self.token_ids) - 1

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache must be able to hold."""
        return len(self.prompt) + self.limit - 1


class DrawPlan:
    """What drawing needs of the running samples and stays the same until one comes or goes."""

    def __init__(self, rows: Sequence[Sample], device: torch.device) -> None:
        params = [row.request.params for row in rows]
        greedy = [row for row, one in enumerate(params) if one.temperature == 0.0]
        temperatures = [one.temperature or 1.0 for one in params]
        self._device = device
        self._keys = np.array([row.key for row in rows], np.uint64)
        self._greedy = torch.tensor(greedy, device=device) if greedy else None
        self._temperatures = None
        if any(one != 1.0 for one in temperatures):
            self._temperatures = torch.tensor(temperatures, device=device).unsqueeze(1)
        self._filtered = [
            row
            for row, (sample, one) in enumerate(zip(rows, params, strict=True))
            if sample.request.constraint is not None or (one.temperature > 0.0 and (one.top_k > 0 or one.top_p < 1.0))
        ]
        self._shifted = [
            row for row, one in enumerate(params) if one.presence_penalty or one.frequency_penalty or one.logit_bias
        ]
        self._minimum = [row for row, one in enumerate(params) if one.min_new_tokens > 0]
        self._masked = [row for row, one in enumerate(params) if one.mask_top_p < 1.0]
        self._mask_top_p = [params[row].mask_top_p for row in self._masked]

    @property
    def needs_mask(self) -> bool:
        """Whether a row draws from the mask policy's set."""
        return bool(self._masked)

    def sets(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`Draw.sets` of the mask policy's logits [B, V] for all rows."""
        rows = torch.tensor(self._masked, device=self._device)
        scores = logits[rows].float()
        if self._temperatures is not None:
            scores = scores / self._temperatures[rows]
        found = torch.empty_like(scores, dtype=torch.bool)
        for top_p in set(self._mask_top_p):
            members = torch.tensor([index for index, one in enumerate(self._mask_top_p) if one == top_p])
            members = members.to(self._device)
            found[members] = top_p_sets(scores[members], top_p)
        return rows, found

    def at(self, rows: Sequence[Sample], ahead: int | np.ndarray = 0) -> Draw:
        """Raises ConstraintError when a caller's constraint does.

        Args:
            ahead: int64 [B], how many tokens after its next one a row stands for.
        """
        positions = np.array([len(row.token_ids) for row in rows]) + ahead
        pairs = [
            (row, stop)
            for row in self._minimum
            if positions[row] < rows[row].request.params.min_new_tokens
            for stop in sorted(rows[row].stops)
        ]
        forbidden = None
        if pairs:
            both = torch.tensor(pairs, device=self._device).unbind(1)
            forbidden = (both[0], both[1])
        shifts = [(row, token, amount) for row in self._shifted for token, amount in _shifts(rows[row])]
        return Draw(
            shifts=None if not shifts else self._triples(shifts),
            uniforms=torch.from_numpy(uniforms(self._keys, positions)).to(self._device).unsqueeze(1),
            temperatures=self._temperatures,
            greedy=self._greedy,
            forbidden=forbidden,
            filters=[_filter(row, rows[row]) for row in self._filtered],
        )

    def _triples(self, shifts: Sequence[tuple[int, int, float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, tokens, amounts = zip(*shifts, strict=True)
        return (
            torch.tensor(rows, device=self._device),
            torch.tensor(tokens, device=self._device),
            torch.tensor(amounts, device=self._device),
        )


def _shifts(sample: Sample) -> list[tuple[int, float]]:
    """What is added to the logits of which tokens, as OpenAI's API defines penalties: over the response's tokens."""
    params = sample.request.params
    found = list(params.logit_bias)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(sample.token_ids)
        found += [(t, -params.presence_penalty - count * params.frequency_penalty) for t, count in counts.items()]
    return found


class ConstraintError(Exception):
    def __init__(self, handle: int, error: SteersmanError) -> None:
        self.handle = handle
        self.error = error


def _filter(row: int, sample: Sample) -> Filter:
    params, constraint = sample.request.params, sample.request.constraint
    allowed = None
    if constraint is not None:
        try:
            allowed = constraint(sample.prompt_index, sample.sample_index, sample.token_ids)
        except Exception as error:
            logger.exception("a token constraint failed")
            raise ConstraintError(sample.handle, InternalError(f"the token constraint failed: {error}")) from error
        if allowed is not None and not allowed.any():
            raise ConstraintError(sample.handle, InvalidArgumentError("the token constraint allows no token"))
    greedy = params.temperature == 0.0
    return Filter(row, 0 if greedy else params.top_k, 1.0 if greedy else params.top_p, allowed)


def report(sample: Sample, reason: FinishReason) -> None:
    finished = SampleFinished(
        prompt_index=sample.prompt_index,
        sample_index=sample.sample_index,
        token_ids=np.array(sample.token_ids, np.int32),
        logprobs=np.array(sample.logprobs, np.float32),
        finish_reason=reason,
        weights_versions=tuple(sample.versions),
    )
    deliver(sample, finished)


def deliver(sample: Sample, event: Event) -> None:
    try:
        sample.on_event(event)
    except Exception:
        logger.exception("a callback for engine events raised; the event is lost")
