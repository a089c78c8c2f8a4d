"""Losses of the policy and the critic on ragged tokens.

Every loss takes `denominator`, the GLOBAL number of tokens (or samples, where its docstring says so) of the optimizer
step, over all micro-batches and ranks, and returns sum / denominator. So the gradients of micro-batches ADD UP to the
gradient of the whole batch, whatever the split, the order or the number of ranks. (Ranks: all-reduce by SUM. DDP and
FSDP average instead; multiply the loss by the world size there.)

Shapes: logprobs, advantages (per token), values, returns, weights are fp32 [T]; lengths int64 [N]; see `segments.py`.
`old_logprobs` are those of the policy at the start of the optimizer epochs, under the trainer's own forward pass.
`weights` are per-token factors that carry no gradient, such as `mismatch.truncated_importance_weights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import InvalidArgumentError
from training.mathematics.kl import KLEstimator, estimate_kl
from training.mathematics.segments import broadcast, segment_mean, segment_sum
from training.mathematics.stats import max_of, sum_of, to_floats


@dataclass(frozen=True)
class PolicyStats:
    """Sums over `count` ratios (tokens, or samples for `rloo_loss`); merge with `stats.merge`.

    loss: numerator of the returned loss. clipped: ratios where the clipped term decided. approx_kl: half the squared
    log-ratio (lm-human-preferences `approxkl`). ratio, ratio_max: pi / pi_old. kl: k3 or other estimate against the
    reference where the loss has such a term.
    """

    count: float = 0.0
    tokens: float = 0.0
    loss: float = 0.0
    clipped: float = 0.0
    approx_kl: float = 0.0
    ratio: float = 0.0
    ratio_max: float = 0.0
    kl: float = 0.0

    def means(self) -> dict[str, float]:
        """Means by metric name."""
        count, tokens = max(self.count, 1.0), max(self.tokens, 1.0)
        return {
            "clip_fraction": self.clipped / count,
            "approx_kl": self.approx_kl / count,
            "ratio_mean": self.ratio / count,
            "ratio_max": self.ratio_max,
            "kl": self.kl / tokens,
        }


@dataclass(frozen=True)
class ValueStats:
    """Sums over `count` tokens. error: (V - return)^2; the rest are moments for the explained variance."""

    count: float = 0.0
    loss: float = 0.0
    clipped: float = 0.0
    error: float = 0.0
    value: float = 0.0
    returns: float = 0.0
    returns_squared: float = 0.0

    def means(self) -> dict[str, float]:
        """Means by metric name; explained_variance is 1 - E[(V - R)^2] / Var[R] (lm-human-preferences)."""
        count = max(self.count, 1.0)
        variance = self.returns_squared / count - (self.returns / count) ** 2
        return {
            "value_loss": self.loss / count,
            "value_clip_fraction": self.clipped / count,
            "value_error": self.error / count,
            "value_mean": self.value / count,
            "return_mean": self.returns / count,
            "explained_variance": 1.0 - self.error / count / variance if variance > 0.0 else 0.0,
        }


@dataclass(frozen=True, eq=False)
class KlTerm:
    """beta * KL(pi || reference) as a term of the loss (DeepSeekMath, equation 3).

    With `correction` the estimate is multiplied by the ratio, through which the gradient flows too: the gradient of k3
    alone is not that of KL(pi || pi_ref), that of ratio * k3 is (DeepSeek-V3.2; TRL's `use_bias_correction_kl`). The
    term carries no `weights`.
    """

    ref_logprobs: Tensor
    """fp32 [T]"""
    coefficient: float
    estimator: KLEstimator = "k3"
    correction: bool = True

    def of(self, logprobs: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """(terms of the loss, KL), both fp32 [T]; `ratio` is pi / pi_old of each token, fp32 [T]."""
        kl = estimate_kl(logprobs, self.ref_logprobs, self.estimator)
        return self.coefficient * (kl * ratio if self.correction else kl), kl


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    denominator: float,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    kl: KlTerm | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Clipped surrogate (Schulman et al. 2017, eq. 7): sum_t max(-A r, -A clip(r, 1 - low, 1 + high)) / denominator.

    r = exp(logprobs - old_logprobs). `clip_high` None means `clip_low` (a larger one is DAPO's clip-higher).
    `dual_clip` c > 1 bounds the term by -A c where A < 0 (Ye et al. 2020, arXiv 1912.09729).
    """
    terms, ratio, clipped = _clipped_surrogate(logprobs - old_logprobs, advantages, clip_low, clip_high, dual_clip)
    if weights is not None:
        terms = terms * weights.detach()
    divergence = None
    if kl is not None:
        penalty, divergence = kl.of(logprobs, ratio)
        terms = terms + penalty
    stats = _policy_stats(terms, ratio, clipped, logprobs - old_logprobs, tokens=logprobs.numel(), kl=divergence)
    return divide(terms, denominator), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, denominator: float, clip: float | None = 0.2
) -> tuple[Tensor, ValueStats]:
    """Squared error with clipped change (lm-human-preferences `vf_loss`): sum_t max(e, e_clipped) / 2 / denominator.

    e = (V - R)^2 and e_clipped the same for V limited to old V +- clip. `clip` None switches the limit off.
    """
    error = (values - returns).square()
    worst = error
    if clip is not None:
        limited = torch.clamp(values, old_values - clip, old_values + clip)
        worst = torch.maximum(error, (limited - returns).square())
    terms = 0.5 * worst
    sums = to_floats(
        sum_of(terms), sum_of(worst > error), sum_of(error), sum_of(values), sum_of(returns), sum_of(returns.square())
    )
    return divide(terms, denominator), ValueStats(float(values.numel()), *sums)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    denominator: float,
    average: Literal["tokens", "samples"] = "tokens",
    kl: KlTerm | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """GRPO (DeepSeekMath eq. 3): PPO's clipped term with a group-relative advantage, plus beta * KL to the reference.

    advantages fp32 [N], one a response. `average` and what the caller gives as `denominator` make the variants:

        tokens,  global tokens              DAPO: every token counts the same (the default)
        samples, global samples             GRPO as published: mean over tokens in a response, then over responses
        tokens,  global samples * constant  Dr. GRPO: no length normalisation, constant = the longest response allowed

    `clip_high` above `clip_low` is DAPO's clip-higher. Reference implementation: TRL 1.16 `GRPOTrainer._compute_loss`.
    """
    log_ratio = logprobs - old_logprobs
    terms, ratio, clipped = _clipped_surrogate(
        log_ratio, broadcast(advantages, lengths), clip_low, clip_high, dual_clip
    )
    if weights is not None:
        terms = terms * weights.detach()
    divergence = None
    if kl is not None:
        penalty, divergence = kl.of(logprobs, ratio)
        terms = terms + penalty
    if average == "samples":
        terms = terms / broadcast(lengths.clamp(min=1), lengths)
    stats = _policy_stats(terms, ratio, clipped, log_ratio, tokens=logprobs.numel(), kl=divergence)
    return divide(terms, denominator), stats


def rloo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    denominator: float,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    kl: KlTerm | None = None,
) -> tuple[Tensor, PolicyStats]:
    """RLOO: the whole response is one action; clipped surrogate on the sequence ratio, summed / global SAMPLES.

    r_i = exp(sum_t logprobs - sum_t old_logprobs); advantages fp32 [N]. At r = 1 its gradient is REINFORCE's,
    A_i * sum_t grad logprob_t (Ahmadian et al. 2024, arXiv 2402.14740). Reference implementation: TRL 1.16
    `RLOOTrainer._compute_loss`. An empty response has ratio 1 whatever the policy is: give it no advantage. The KL term
    is summed over a response's tokens, each with its own ratio.
    """
    token_log_ratio = logprobs - old_logprobs
    log_ratio = segment_sum(token_log_ratio, lengths)
    terms, ratio, clipped = _clipped_surrogate(log_ratio, advantages, clip_low, clip_high, None)
    divergence = None
    if kl is not None:
        penalty, divergence = kl.of(logprobs, token_log_ratio.exp())
        terms = terms + segment_sum(penalty, lengths)
    stats = _policy_stats(terms, ratio, clipped, log_ratio, tokens=logprobs.numel(), kl=divergence)
    return divide(terms, denominator), stats


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    denominator: float,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights: Tensor | None = None,
    kl: KlTerm | None = None,
) -> tuple[Tensor, PolicyStats]:
    """GSPO (Zheng et al. 2025, arXiv 2507.18071, equations 5 and 7), summed over responses / global SAMPLES.

        s_i = exp(mean_t (logprobs - old_logprobs)),   max(-A_i s_i, -A_i clip(s_i, 1 - low, 1 + high))

    advantages and weights fp32 [N]. The KL term is the mean over a response's tokens, its ratio s_i. Reference
    implementation: TRL 1.16 `GRPOTrainer` with `importance_sampling_level="sequence"` and `loss_type="grpo"`.
    """
    log_ratio = segment_mean(logprobs - old_logprobs, lengths)
    terms, ratio, clipped = _clipped_surrogate(log_ratio, advantages, clip_low, clip_high, None)
    if weights is not None:
        terms = terms * weights.detach()
    divergence = None
    if kl is not None:
        penalty, divergence = kl.of(logprobs, broadcast(ratio, lengths))
        terms = terms + segment_mean(penalty, lengths)
    stats = _policy_stats(terms, ratio, clipped, log_ratio, tokens=logprobs.numel(), kl=divergence)
    return divide(terms, denominator), stats


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    denominator: float,
    weight_cap: float = 5.0,
    weights: Tensor | None = None,
    kl: KlTerm | None = None,
) -> tuple[Tensor, PolicyStats]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): -sum_t sg(min(r_t, cap)) A_t logprob_t / denominator.

    r_t = exp(logprobs - old_logprobs); the weight carries no gradient, so a token whose ratio is beyond the cap still
    teaches. advantages fp32 [T]. Reference implementation: TRL 1.16 `GRPOTrainer` with `loss_type="cispo"`.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    terms = -ratio.detach().clamp(max=weight_cap) * advantages.detach() * logprobs
    if weights is not None:
        terms = terms * weights.detach()
    divergence = None
    if kl is not None:
        penalty, divergence = kl.of(logprobs, ratio)
        terms = terms + penalty
    stats = _policy_stats(terms, ratio, ratio > weight_cap, log_ratio, tokens=logprobs.numel(), kl=divergence)
    return divide(terms, denominator), stats


def online_preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    denominator: float,
    beta: float,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
) -> Tensor:
    """DPO's (Rafailov et al. 2023, equation 7) or IPO's (Azar et al. 2023) loss, summed over pairs / global pairs.

        h = chosen - rejected,   sigmoid: -log sigmoid(beta h),   ipo: (h - 1 / (2 beta))^2

    chosen and rejected fp32 [P] are log pi - log pi_ref summed over the tokens of the answer. Reference implementation:
    TRL 1.16 `OnlineDPOTrainer`.
    """
    margin = chosen - rejected
    terms = -F.logsigmoid(beta * margin) if kind == "sigmoid" else (margin - 1.0 / (2.0 * beta)).square()
    return divide(terms, denominator)


def nll_loss(logprobs: Tensor, *, denominator: float) -> Tensor:
    """Language-model loss -sum_t logprob_t / denominator.

    The term of PPO-ptx (InstructGPT eq. 2): the caller adds gamma times this loss, taken on
    pretraining text or demonstrations, with the global number of ITS tokens as denominator.
    """
    return divide(-logprobs, denominator)


def _clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float | None, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss terms, ratio, bool where a clip decided), all of the shape of `log_ratio`."""
    advantages = advantages.detach()
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    limited = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + (clip_low if clip_high is None else clip_high))
    terms = torch.maximum(plain, limited)
    clipped = limited > plain
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        clipped = clipped | (terms > bound)
        terms = torch.minimum(terms, bound)
    return terms, ratio, clipped


def _policy_stats(
    terms: Tensor,
    ratio: Tensor,
    clipped: Tensor,
    log_ratio: Tensor,
    *,
    tokens: int,
    kl: Tensor | None = None,
) -> PolicyStats:
    loss, n_clipped, approx_kl, ratio_sum, ratio_max, kl_sum = to_floats(
        sum_of(terms),
        sum_of(clipped),
        sum_of(0.5 * log_ratio.square()),
        sum_of(ratio),
        max_of(ratio),
        terms.new_zeros(()) if kl is None else sum_of(kl),
    )
    return PolicyStats(
        count=float(ratio.numel()),
        tokens=float(tokens),
        loss=loss,
        clipped=n_clipped,
        approx_kl=approx_kl,
        ratio=ratio_sum,
        ratio_max=ratio_max,
        kl=kl_sum,
    )


def divide(terms: Tensor, denominator: float) -> Tensor:
    """0-d: sum of all terms / denominator; raises InvalidArgumentError unless the denominator is above 0."""
    if not denominator > 0:
        raise InvalidArgumentError(f"the loss denominator must be the positive global count, got {denominator}")
    return terms.sum() / denominator
