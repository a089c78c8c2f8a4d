"""Pure tensor mathematics of alignment: no I/O, no configuration, no models. See docs/algorithms.md.

segments       ragged batches: per-token tensors [T] beside `lengths` [N]
logprobs       log-probabilities and entropies from hidden states, in chunks
kl             k1, k2, k3 estimates; fixed and adaptive coefficient
rewards        scores -> per-token or per-response rewards
moments        global statistics and whitening
advantages     GAE, RLOO, GRPO, REINFORCE
losses         PPO, value, GRPO, RLOO, REINFORCE, PPO-ptx, each over a global denominator
reward_losses  pairwise with margin and centering, binary, aspects
mismatch       engine against trainer: statistics and truncated importance weights
stats          statistics that add up over micro-batches
"""

from training.mathematics.advantages import gae, grpo, reinforce, rloo, to_tokens
from training.mathematics.kl import AdaptiveKL, FixedKL, KLController, KLEstimator, estimate_kl, k1, k2, k3
from training.mathematics.logprobs import token_logprobs
from training.mathematics.losses import (
    KlTerm,
    PolicyStats,
    ValueStats,
    cispo_loss,
    grpo_loss,
    gspo_loss,
    nll_loss,
    ppo_policy_loss,
    preference_loss,
    reinforce_loss,
    rloo_loss,
    value_loss,
)
from training.mathematics.mismatch import MismatchStats, mismatch_stats, truncated_importance_weights
from training.mathematics.moments import Moments, whiten
from training.mathematics.reward_losses import (
    RewardStats,
    aspect_loss,
    binary_loss,
    combine_aspects,
    pairwise_loss,
)
from training.mathematics.rewards import (
    clip_scores,
    penalize_missing_eos,
    present,
    scale_scores,
    sequence_rewards,
    token_rewards,
)
from training.mathematics.segments import (
    broadcast,
    last_indices,
    reverse_discounted_sum,
    segment_ids,
    segment_mean,
    segment_sum,
    select,
    starts,
)
from training.mathematics.stats import merge

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "KLController",
    "KLEstimator",
    "KlTerm",
    "MismatchStats",
    "Moments",
    "PolicyStats",
    "RewardStats",
    "ValueStats",
    "aspect_loss",
    "binary_loss",
    "broadcast",
    "cispo_loss",
    "clip_scores",
    "combine_aspects",
    "estimate_kl",
    "gae",
    "grpo",
    "grpo_loss",
    "gspo_loss",
    "k1",
    "k2",
    "k3",
    "last_indices",
    "merge",
    "mismatch_stats",
    "nll_loss",
    "pairwise_loss",
    "penalize_missing_eos",
    "ppo_policy_loss",
    "preference_loss",
    "present",
    "reinforce",
    "reinforce_loss",
    "reverse_discounted_sum",
    "rloo",
    "rloo_loss",
    "scale_scores",
    "segment_ids",
    "segment_mean",
    "segment_sum",
    "select",
    "sequence_rewards",
    "starts",
    "to_tokens",
    "token_logprobs",
    "token_rewards",
    "truncated_importance_weights",
    "value_loss",
    "whiten",
]
