"""Drawing tokens: counter-based random numbers, inverse distribution function, exact log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.nn.hardware import array_of
from steersman.nn.top_p import top_p_edges

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014); uint64 in, uint64 out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(seed: int, prompt_index: int, sample_index: int) -> np.uint64:
    """The random stream of one sample; independent of what else is in the batch."""
    key = np.array([seed], np.uint64)
    for number in (prompt_index, sample_index):
        key = _mix(key + _GOLDEN) ^ np.uint64(number)
    return _mix(key + _GOLDEN)[0]


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Number `positions[i]` of stream `keys[i]`: float64 [B] in [0, 1)."""
    bits = _mix(keys + _GOLDEN * (positions.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def end_tokens(*configs: object) -> frozenset[int]:
    """End-of-sequence tokens of the first configuration that names any; given are the generation's and the model's."""
    for config in configs:
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


@dataclass(frozen=True, slots=True)
class Filter:
    """A restriction of one row beyond forbidden tokens."""

    row: int
    top_k: int = 0
    top_p: float = 1.0
    allowed: np.ndarray | None = None
    """bool [V]"""


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw for a batch of B rows."""

    uniforms: Tensor
    """float64 [B, 1] in [0, 1)"""
    temperatures: Tensor | None = None
    """float32 [B, 1], 1 where greedy; None: all are 1."""
    greedy: Tensor | None = None
    """int64 rows that take the most likely token; None: none does."""
    shifts: tuple[Tensor, Tensor, Tensor] | None = None
    """int64 [S] rows, int64 [S] tokens and float32 [S] what is added to their logits: penalties and biases."""
    forbidden: tuple[Tensor, Tensor] | None = None
    """int64 [F] rows and int64 [F] tokens that they must not draw (each pair once)."""
    filters: Sequence[Filter] = ()
    sets: tuple[Tensor, Tensor] | None = None
    """int64 [M] rows and bool [M, V] the tokens that make up their distribution (an older policy's top-p sets)."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """`tokens` int64 [B]; `logprobs` float32 [B]; `scores` [B, V] and `normaliser` float32 [B, 1] give every token's
    log-probability.
    """

    tokens: Tensor
    logprobs: Tensor
    scores: Tensor
    normaliser: Tensor

    def top(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        """The `count` most likely tokens of a row and their log-probabilities."""
        best = torch.topk(self.scores[row] - self.normaliser[row], min(count, self.scores.shape[1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple((token, logprob) for token, logprob in pairs if logprob > -math.inf)


def prompt_scores(logits: Tensor, targets: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of `targets` int64 [T] after logits [T, V]: log-probabilities float32 [T]; the `count` most likely tokens int32
    [T, count] and theirs float32 [T, count], with no token beyond the vocabulary.
    """
    scores = logits.float().log_softmax(-1)
    best = torch.topk(scores, min(count, scores.shape[1]))
    chosen = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
    return chosen.cpu().numpy(), best.indices.cpu().numpy().astype(np.int32), best.values.cpu().numpy()


def draw(logits: Tensor, how: Draw) -> Drawn:
    """Draws one token a row from logits [B, V], which it may overwrite.

    The distribution function is searched in two levels, blocks and the tokens of one block, so that a step reads
    the [B, V] values a few times and never sorts or accumulates them (`torch.multinomial` does).
    """
    scores = logits
    if how.shifts is not None:
        places, amounts = how.shifts[:2], how.shifts[2]
        scores = scores.float().index_put(places, amounts, accumulate=True)
    scores = scores if how.temperatures is None else scores.float() / how.temperatures
    if how.sets is not None:
        rows_of_sets, sets = how.sets
        scores[rows_of_sets] = scores[rows_of_sets].masked_fill_(~sets, -math.inf)
    hidden = None
    if how.forbidden is not None:
        hidden = scores[how.forbidden]
        scores[how.forbidden] = -math.inf
    vocab = scores.shape[1]
    block = 256 if vocab >= 4096 else 16
    highest, by_block = _block_sums(scores, block)
    total = by_block.sum(1, keepdim=True)
    if how.forbidden is not None and hidden is not None:
        of_hidden = (hidden.float() - highest[how.forbidden[0], 0]).double().exp_()
        total = total.double().index_add(0, how.forbidden[0], of_hidden.unsqueeze(1))
    normaliser = (highest + total.log()).float()
    filtered = [_filter(scores[one.row].float(), one) for one in how.filters]
    for one, weights in zip(how.filters, filtered, strict=True):
        by_block[one.row] = F.pad(weights, (0, -vocab % block)).view(-1, block).sum(1)

    ends = by_block.double().cumsum(1)
    goal = how.uniforms * ends[:, -1:]
    chosen = _first_above(ends, goal)
    goal = goal - (ends.gather(1, chosen) - by_block.gather(1, chosen))
    places_inside = chosen * block + torch.arange(block, device=scores.device)
    within = places_inside.clamp(max=vocab - 1)
    inside = (scores.gather(1, within).float() - highest).exp_()
    for one, weights in zip(how.filters, filtered, strict=True):
        inside[one.row] = weights[within[one.row]]
    inside.masked_fill_(places_inside >= vocab, 0.0)
    tokens = (chosen * block + _first_above(inside.double().cumsum(1), goal)).squeeze(1)
    if how.greedy is not None:
        likely = scores[how.greedy]
        for one, weights in zip(how.filters, filtered, strict=True):
            likely = likely.masked_fill((how.greedy == one.row).unsqueeze(1) & (weights == 0), -math.inf)
        tokens[how.greedy] = likely.argmax(1)
    logprobs = (scores.gather(1, tokens.unsqueeze(1)).float() - normaliser).squeeze(1)
    if how.forbidden is not None and hidden is not None:
        scores[how.forbidden] = hidden
    return Drawn(tokens, logprobs, scores, normaliser)


def _block_sums(scores: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of [B, V]: the highest of each row [B, 1], and the sums of e^(score - highest) over blocks of its tokens
    [B, ceil(V / block)], float32.
    """
    rows, vocab = scores.shape
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.bfloat16):
        from services.policy.engines import kernels  # compiles where nothing is cached

        highest, sums = torch.empty(rows), torch.empty(rows, -(-vocab // block))
        arrays = array_of(scores.contiguous()), highest.numpy(), sums.numpy()
        kernels.block_sums(*arrays, block, torch.get_num_threads() if rows > 1 else 1)
        return highest.unsqueeze(1), sums
    top = scores.amax(1, keepdim=True).float()
    weights = F.pad((scores.float() - top).exp_(), (0, -vocab % block))
    return top, weights.view(rows, -1, block).sum(2)


def _first_above(ends: Tensor, goal: Tensor) -> Tensor:
    """Rounding may put the goal at or beyond the last end: then the last place with a weight of its own."""
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends, goal, right=True), last)


def _filter(scores: Tensor, how: Filter) -> Tensor:
    """Unnormalised probabilities [V] after the restrictions, 0 where forbidden.

    In the order of transformers' processors: allowed tokens, top-k, top-p; ties at the edge stay.
    """
    if how.allowed is not None:
        scores = scores.where(torch.from_numpy(how.allowed).to(scores.device), -math.inf)
    weights = (scores - scores.max()).exp_()
    if 0 < how.top_k < len(weights):
        edge = torch.topk(weights, how.top_k).values[-1]
        weights = weights.where(weights >= edge, 0.0)
    if how.top_p < 1.0:
        edge = top_p_edges(weights[None], how.top_p)[0]
        weights = weights.where(weights >= edge, 0.0)
    return weights
