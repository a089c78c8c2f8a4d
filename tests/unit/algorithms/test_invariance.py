"""Losses, gradients and statistics do not change with micro-batch split, order, padding or ranks.

A small linear model makes the log-probabilities, so that gradients of real parameters are compared. Each split uses the
global denominators and global moments and adds the gradients up, as the trainer does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.mathematics.advantages import gae, grpo, rloo
from training.mathematics.kl import k1
from training.mathematics.logprobs import token_logprobs
from training.mathematics.losses import KlTerm, PolicyStats, grpo_loss, ppo_policy_loss, rloo_loss, value_loss
from training.mathematics.mismatch import mismatch_stats, truncated_importance_weights
from training.mathematics.moments import Moments, whiten
from training.mathematics.rewards import sequence_rewards, token_rewards
from training.mathematics.segments import broadcast, select
from training.mathematics.stats import merge

WIDTH, VOCABULARY = 6, 19
LENGTHS = torch.tensor([4, 0, 1, 9, 3, 0, 7, 2, 5, 1, 12, 6])
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 4])
N, T = len(LENGTHS), int(LENGTHS.sum())

Loss = Callable[["Samples", Tensor, Tensor], tuple[Tensor, list]]


class Samples:
    """Some of the samples; `padding` puts that many rubbish positions after each response before the forward pass."""

    def __init__(self, tensors: dict[str, Tensor], lengths: Tensor, padding: int = 0) -> None:
        self.tensors, self.lengths, self.padding = tensors, lengths, padding

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def take(self, index: Tensor) -> Samples:
        """The samples in `index`, in its order."""
        picked = {}
        for name, value in self.tensors.items():
            if value.shape[0] == self.lengths.numel():
                picked[name] = value[index]
            else:
                rows = value.split(self.lengths.tolist())
                picked[name] = torch.cat([rows[i] for i in index.tolist()])
        return Samples(picked, self.lengths[index], self.padding)

    def forward(self, head: Tensor, critic: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies, values) of the response tokens, through a padded forward pass."""
        hidden, targets, lengths = self["hidden"], self["targets"], self.lengths
        if self.padding:
            rubbish = torch.full((self.padding, WIDTH), 7.0, dtype=hidden.dtype)
            rows = hidden.split(lengths.tolist())
            padded = torch.cat([x for row in rows for x in (row, rubbish)])
            # Token id 0 is also a real token of the responses: only lengths may tell padding apart.
            labels = torch.cat(
                [
                    x
                    for row in targets.split(lengths.tolist())
                    for x in (row, torch.zeros(self.padding, dtype=torch.long))
                ]
            )
            logprobs, _ = token_logprobs(padded, head, labels, chunk_tokens=5)
            sizes = torch.stack((lengths, torch.full_like(lengths, self.padding)), 1).flatten()
            real = torch.tensor([True, False]).repeat(lengths.numel())
            pick = [select(x, sizes, real) for x in (logprobs, padded @ critic)]
            return pick[0], pick[1]
        logprobs, _ = token_logprobs(hidden, head, targets, chunk_tokens=5)
        return logprobs, hidden @ critic


@pytest.fixture
def samples() -> Samples:
    torch.manual_seed(0)
    old = -torch.rand(T, dtype=torch.float64) * 3 - 1
    tensors = {
        "hidden": torch.randn(T, WIDTH, dtype=torch.float64),
        "targets": torch.randint(0, VOCABULARY, (T,)),
        "old": old,
        "ref": old + 0.3 * torch.randn(T, dtype=torch.float64),
        "engine": old + 0.5 * torch.randn(T, dtype=torch.float64),
        "old_values": torch.randn(T, dtype=torch.float64),
        "scores": torch.randn(N, dtype=torch.float64),
    }
    kl = k1(old, tensors["ref"])
    rewards = token_rewards(tensors["scores"], kl, LENGTHS, 0.05)
    tensors["advantages"], tensors["returns"] = gae(rewards, tensors["old_values"], LENGTHS)
    keep = LENGTHS > 0
    whole = sequence_rewards(tensors["scores"], kl, LENGTHS, 0.05)[keep]
    for name, estimate in (("rloo", rloo), ("grpo", grpo)):
        tensors[name] = torch.zeros(N, dtype=torch.float64)
        tensors[name][keep] = estimate(whole, GROUP[keep])
    return Samples(tensors, LENGTHS)


def ppo(batch: Samples, head: Tensor, critic: Tensor, moments: Moments | None = None) -> tuple[Tensor, list]:
    logprobs, values = batch.forward(head, critic)
    moments = MOMENTS["advantages"] if moments is None else moments
    loss, stats = ppo_policy_loss(
        logprobs,
        batch["old"],
        whiten(batch["advantages"], moments),
        denominator=T,
        weights=truncated_importance_weights(batch["old"], batch["engine"]),
    )
    critic_loss, critic_stats = value_loss(values, batch["old_values"], batch["returns"], denominator=T)
    return loss + 0.1 * critic_loss, [stats, critic_stats, mismatch_stats(batch["old"], batch["engine"])]


def grpo_by(average: str, denominator: int) -> Loss:
    def loss(batch: Samples, head: Tensor, critic: Tensor) -> tuple[Tensor, list]:
        logprobs, _ = batch.forward(head, critic)
        value, stats = grpo_loss(
            logprobs,
            batch["old"],
            batch["grpo"],
            batch.lengths,
            denominator=denominator,
            average=average,  # type: ignore[arg-type]
            kl=KlTerm(batch["ref"], 0.1),
        )
        return value, [stats]

    return loss


def rloo_sequence(batch: Samples, head: Tensor, critic: Tensor) -> tuple[Tensor, list]:
    logprobs, _ = batch.forward(head, critic)
    loss, stats = rloo_loss(logprobs, batch["old"], batch["rloo"], batch.lengths, denominator=N)
    return loss, [stats]


LOSSES = {
    "ppo": ppo,
    "grpo tokens": grpo_by("tokens", T),
    "grpo samples": grpo_by("samples", N),
    "dr grpo": grpo_by("tokens", N * 16),
    "rloo": rloo_sequence,
}
MOMENTS: dict[str, Moments] = {}


def step(loss: Loss, parts: list[Samples]) -> tuple[float, list[Tensor], list[dict[str, float]]]:
    """(loss, gradients, means) of one optimizer step over micro-batches."""
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    critic = torch.randn(WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    total, collected = 0.0, []
    for part in parts:
        value, stats = loss(part, head, critic)
        value.backward()
        total += value.item()
        collected.append(stats)
    means = [merge(kind).means() for kind in zip(*collected, strict=True)]
    return total, [p.grad for p in (head, critic) if p.grad is not None], means


def splits(samples: Samples) -> dict[str, list[Samples]]:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    everything = torch.arange(N)
    padded = Samples(samples.tensors, samples.lengths, padding=3)
    return {
        "one by one": [samples.take(everything[i : i + 1]) for i in range(N)],
        "uneven": [samples.take(part) for part in everything.split([1, 7, 4])],
        "other order": [samples.take(order)],
        "other order, split": [samples.take(part) for part in order.split(5)],
        "padded": [padded],
        "padded, split": [padded.take(part) for part in everything.split(4)],
        "two ranks of two micro-batches": [
            samples.take(part) for rank in everything.split([3, 9]) for part in rank.split(5)
        ],
    }


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_depend_on_how_the_batch_is_cut(name: str, samples: Samples) -> None:
    MOMENTS["advantages"] = Moments.of(samples["advantages"])
    loss, gradients, means = step(LOSSES[name], [samples])
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    for split, parts in splits(samples).items():
        other_loss, other_gradients, other_means = step(LOSSES[name], parts)
        assert other_loss == pytest.approx(loss, rel=1e-12, abs=1e-12), split
        for ours, theirs in zip(other_gradients, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=split)
        for one, other in zip(means, other_means, strict=True):
            assert other == pytest.approx(one, rel=1e-10, abs=1e-12), split


def test_global_moments_are_what_makes_whitening_invariant(samples: Samples) -> None:
    """The test above can fail: with the moments of each micro-batch the step is another one."""

    def local(batch: Samples, head: Tensor, critic: Tensor) -> tuple[Tensor, list]:
        return ppo(batch, head, critic, Moments.of(batch["advantages"]))

    whole = step(local, [samples])[0]
    cut = step(local, splits(samples)["uneven"])[0]
    assert abs(whole - cut) > 1e-3


def test_moments_of_ranks_add_up_to_those_of_the_batch(samples: Samples) -> None:
    parts = splits(samples)["two ranks of two micro-batches"]
    total = sum((Moments.of(part["advantages"]) for part in parts), Moments())
    whole = Moments.of(samples["advantages"])
    assert (total.count, total.mean, total.std) == pytest.approx((whole.count, whole.mean, whole.std), rel=1e-12)


def test_advantages_do_not_depend_on_the_order_of_samples(samples: Samples) -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    shuffled = samples.take(order)
    kl = k1(shuffled["old"], shuffled["ref"])
    advantages, returns = gae(
        token_rewards(shuffled["scores"], kl, shuffled.lengths, 0.05), shuffled["old_values"], shuffled.lengths
    )
    assert torch.equal(advantages, shuffled["advantages"])
    assert torch.equal(returns, shuffled["returns"])
    keep = shuffled.lengths > 0
    rewards = sequence_rewards(shuffled["scores"], kl, shuffled.lengths, 0.05)[keep]
    torch.testing.assert_close(rloo(rewards, GROUP[order][keep]), shuffled["rloo"][keep], rtol=1e-12, atol=1e-12)


def test_fp32_sums_stay_within_rounding() -> None:
    """The real dtype: 20,000 tokens in one micro-batch or in forty."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 200, (200,), generator=generator)
    tokens = int(lengths.sum())
    old = -torch.rand(tokens, generator=generator)
    new, advantages = old + 0.1 * torch.randn(tokens, generator=generator), torch.randn(200, generator=generator)
    per_token = broadcast(advantages, lengths)
    whole, stats = ppo_policy_loss(new, old, per_token, denominator=tokens)
    rows = [x.split(lengths.tolist()) for x in (new, old, per_token)]
    parts = [
        ppo_policy_loss(*(torch.cat(row[i : i + 5]) for row in rows), denominator=tokens) for i in range(0, 200, 5)
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), abs=1e-6)
    merged: PolicyStats = merge(part for _, part in parts)
    assert merged.means() == pytest.approx(stats.means(), rel=1e-6)
