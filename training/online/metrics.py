"""The metrics of an update; docs/metrics.md explains them."""

from __future__ import annotations

from collections.abc import Sequence

from training.algorithms.method import Estimates, LossStats
from training.batch import SampleBatch
from training.mathematics import losses, mismatch, segments, stats


def sequence_kl(batch: SampleBatch, estimates: Estimates) -> float:
    """Nats a response, k1 summed over its tokens."""
    return segments.segment_sum(estimates.kl, batch.lengths).mean().item()


def update_metrics(
    batch: SampleBatch,
    estimates: Estimates,
    collected: Sequence[LossStats],
    norms: Sequence[dict[str, float]],
    mismatch_cap: float,
) -> dict[str, float]:
    """Args:
    collected: statistics of the updates that were looked at.
    norms: gradient norms by name, of the updates that were made.
    """
    policy = stats.merge([losses.PolicyStats(), *(found.policy for found in collected)])
    value = stats.merge([losses.ValueStats(), *(found.value for found in collected)])
    drift = mismatch.mismatch_stats(estimates.old_logprobs, batch.engine_logprobs, mismatch_cap)
    means = policy.means()
    loss_kl = means.pop("kl")
    return {
        "policy_loss": policy.loss / max(policy.count, 1.0),
        "updates": float(len(norms)),
        **{name: sum(norm[name] for norm in norms) / len(norms) for name in (norms[0] if norms else ())},
        **means,
        **({"loss_kl": loss_kl} if policy.kl else {}),
        **(value.means() if value.count else {}),
        **{f"mismatch_{name}": number for name, number in drift.means().items()},
        "entropy": -batch.engine_logprobs.mean().item(),
        "kl": sequence_kl(batch, estimates),
    }
