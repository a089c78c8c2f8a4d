"""From scores (one number a response) to rewards (one number a token).

A missing score is NaN. It is never read as 0: NaN passes through every score transformation here, and `token_rewards`
refuses it, so the caller must have excluded the sample (`present`, then `segments.select`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from steersman.errors import InvalidArgumentError
from training.mathematics.segments import check_lengths, last_indices, segment_sum


def present(scores: Tensor, lengths: Tensor) -> Tensor:
    """bool [N]: samples that can be trained on, i.e. whose score is there and whose response is not empty."""
    return ~scores.isnan() & (lengths > 0)


def penalize_missing_eos(
    scores: Tensor, has_eos: Tensor, penalty: float, mode: Literal["subtract", "replace"] = "subtract"
) -> Tensor:
    """fp32 [N]: scores, made worse where the response did not end with EOS (`has_eos` is bool [N]).

    `subtract`: score - penalty (TRL's `missing_eos_penalty`). `replace`: the score becomes -penalty whatever the reward
    model said (summarize_from_feedback_details `penalty_reward_value` = -1). A missing score stays missing.
    """
    worse = scores - penalty if mode == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(has_eos | scores.isnan(), scores, worse)


def overlong_punishment(lengths: Tensor, limit: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """fp32 [N]: 0 up to `limit - buffer` tokens, growing linearly to `penalty` at `limit` (DAPO, equation 13).

    lengths int64 [N]; limit and buffer in tokens, buffer above 0.
    """
    return ((lengths - (limit - buffer)).clamp(min=0, max=buffer).float() / buffer) * penalty


def clip_parts(scores: Tensor, parts: Mapping[str, Tensor], weights: Mapping[str, float], limit: float) -> Tensor:
    """fp32 [N]: scores in which each of `parts` (fp32 [N], weighted by `weights`) counts at most `limit` either way.

    For the standardised outputs of reward models, whose far values say little. A computed reward has a scale of its
    own (60 of 100 points) and must not be among the parts. A part that is missing (NaN) has nothing to clip: one
    without a weight may fail where the score is there.
    """
    for name, values in parts.items():
        beyond = (values - values.clamp(-limit, limit)).nan_to_num(nan=0.0)
        scores = scores - weights[name] * beyond
    return scores


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coefficient: float) -> Tensor:
    """fp32 [T]: r_t = -beta * kl_t, plus the score on the last real token of the response (its EOS if it has one).

    Shapes: scores [N], kl [T] (see `kl.py`), lengths int64 [N]. An empty response gets no reward written anywhere.
    Source: `compute_rewards` in lm-human-preferences train_policy.py; InstructGPT eq. 2.
    Raises InvalidArgumentError if the score of a response that is not empty is missing.
    """
    check_lengths(kl, lengths)
    filled = lengths > 0
    if bool(scores[filled].isnan().any()):
        raise InvalidArgumentError("a score is missing (NaN); exclude the sample before rewards are computed")
    return (-kl_coefficient * kl).index_add(0, last_indices(lengths)[filled], scores[filled].to(kl.dtype))


def sequence_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coefficient: float) -> Tensor:
    """fp32 [N]: R = score - beta * sum_t kl_t, for the critic-free methods (RLOO: Ahmadian et al. 2024).

    NaN (no reward) where the score is missing or the response is empty.
    """
    rewards = scores - kl_coefficient * segment_sum(kl, lengths).to(scores.dtype)
    return torch.where(present(scores, lengths), rewards, torch.nan)
