"""Policy and value losses on numbers worked by hand: values, gradients and statistics."""

from __future__ import annotations

import math

import pytest
import torch

from steersman.errors import InvalidArgumentError
from training.mathematics.losses import KlTerm, grpo_loss, nll_loss, ppo_policy_loss, rloo_loss, value_loss
from training.mathematics.stats import merge

# Ratios 1.5, 0.5, 1.1, 0.9 by construction.
OLD = torch.tensor([-1.0, -1.0, -2.0, -2.0], dtype=torch.float64)
RATIO = torch.tensor([1.5, 0.5, 1.1, 0.9], dtype=torch.float64)


def logprobs() -> torch.Tensor:
    return (OLD + RATIO.log()).requires_grad_()


def test_ppo_by_hand() -> None:
    # A = 1, 1, -2, -2; clip 0.2. max(-A r, -A clip(r)):
    #   max(-1.5, -1.2) = -1.2 clipped;  max(-0.5, -0.8) = -0.5;  max(2.2, 2.2) = 2.2;  max(1.8, 1.8) = 1.8
    # sum 2.3, / 10 tokens of the whole batch = 0.23
    new = logprobs()
    loss, stats = ppo_policy_loss(new, OLD, torch.tensor([1.0, 1.0, -2.0, -2.0]), denominator=10)
    loss.backward()
    assert loss.item() == pytest.approx(0.23)
    # d loss / d logprob = -A r / 10 where the first term decides, 0 where it is clipped
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0, -0.05, 0.22, 0.18])
    assert (stats.count, stats.clipped, stats.loss) == (4, 1, pytest.approx(2.3))
    assert (stats.ratio, stats.ratio_max) == (pytest.approx(4.0), pytest.approx(1.5))
    # (ln 1.5)^2 + (ln 0.5)^2 + (ln 1.1)^2 + (ln 0.9)^2 = 0.164402 + 0.480453 + 0.009084 + 0.011101, halved
    assert stats.approx_kl == pytest.approx(0.332520, abs=1e-6)
    assert stats.means()["clip_fraction"] == 0.25


def test_ppo_clip_bites_only_where_it_must() -> None:
    # A < 0: ratio 0.5 is pessimistic at 0.8: max(0.5, 0.8) = 0.8; ratio 1.5 is not: max(1.5, 1.2) = 1.5
    new = logprobs()
    loss, stats = ppo_policy_loss(new, OLD, torch.tensor([-1.0, -1.0, 0.0, 0.0]), denominator=1)
    assert (loss.item(), stats.clipped) == (pytest.approx(2.3), 1)


def test_ppo_clip_higher_and_dual_clip_by_hand() -> None:
    # high 0.4: max(-1.5, -1.4) = -1.4
    loss, _ = ppo_policy_loss(logprobs(), OLD, torch.tensor([1.0, 0, 0, 0]), denominator=1, clip_low=0.2, clip_high=0.4)
    assert loss.item() == pytest.approx(-1.4)
    # ratio 8, A = -1: 8 without, 3 with dual clip 3, and no gradient
    new = torch.tensor([math.log(8.0)], requires_grad=True)
    old, advantage = torch.zeros(1), torch.tensor([-1.0])
    assert ppo_policy_loss(new, old, advantage, denominator=1)[0].item() == pytest.approx(8.0)
    loss, stats = ppo_policy_loss(new, old, advantage, denominator=1, dual_clip=3.0)
    loss.backward()
    assert new.grad is not None
    assert (loss.item(), new.grad.item(), stats.clipped) == (pytest.approx(3.0), 0.0, 1)


def test_ppo_weights_by_hand() -> None:
    # terms of the first test times weights 2, 1, 0.5, 0: -2.4 - 0.5 + 1.1 + 0 = -1.8
    weights = torch.tensor([2.0, 1.0, 0.5, 0.0], requires_grad=True)
    loss, _ = ppo_policy_loss(
        logprobs(),
        OLD,
        torch.tensor([1.0, 1.0, -2.0, -2.0]),
        denominator=1,
        weights=weights,
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1.8)
    assert weights.grad is None


def test_value_loss_by_hand() -> None:
    # V 1.0, old 0.5, R 0: e = 1, limited V = 0.7: 0.49 -> 1;      V 1.0, old 0.5, R 2: e = 1, 1.69 -> 1.69 clipped
    # V 0.6, old 0.5, R 0: e = 0.36 twice.  Half the sum / 2 = (1 + 1.69 + 0.36) / 4 = 0.7625
    values = torch.tensor([1.0, 1.0, 0.6], requires_grad=True)
    old, returns = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.0, 2.0, 0.0])
    loss, stats = value_loss(values, old, returns, denominator=2)
    loss.backward()
    assert loss.item() == pytest.approx(0.7625)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.5, 0.0, 0.3])
    assert (stats.clipped, stats.error) == (1, pytest.approx(2.36))
    # Var[R] of 0, 2, 0 = 8/9; error 2.36/3: 1 - 0.786667/0.888889 = 0.115
    assert stats.means()["explained_variance"] == pytest.approx(0.115)
    assert value_loss(values, old, returns, denominator=2, clip=None)[0].item() == pytest.approx(2.36 / 4)


LENGTHS = torch.tensor([1, 0, 3])
ADVANTAGES = torch.tensor([1.0, 5.0, -2.0])
# per token: A = 1, -2, -2, -2 at ratios 1.5, 0.5, 1.1, 0.9: -1.2, max(1, 1.6) = 1.6, 2.2, 1.8


def test_grpo_variants_by_hand() -> None:
    def loss(**options) -> float:
        return grpo_loss(logprobs(), OLD, ADVANTAGES, LENGTHS, **options)[0].item()

    # tokens: (-1.2 + 1.6 + 2.2 + 1.8) / 4 = 1.1
    assert loss(denominator=4) == pytest.approx(1.1)
    # samples: (-1.2 + 5.6 / 3) / 3 responses = 0.222222
    assert loss(denominator=3, average="samples") == pytest.approx(0.2222222)
    # Dr. GRPO: 4.4 / (3 responses * 16 tokens allowed)
    assert loss(denominator=3 * 16) == pytest.approx(4.4 / 48)


def test_grpo_kl_term_by_hand() -> None:
    # ref = new + ln 2 at the first token only: k3 = 2 - 1 - ln 2 = 0.3068528 there, 0 elsewhere; beta 0.1; ratio 1.5
    new = logprobs()
    ref = new.detach() + torch.tensor([math.log(2.0), 0.0, 0.0, 0.0])
    plain, stats = grpo_loss(new, OLD, ADVANTAGES, LENGTHS, denominator=4, kl=KlTerm(ref, 0.1, correction=False))
    corrected, _ = grpo_loss(new, OLD, ADVANTAGES, LENGTHS, denominator=4, kl=KlTerm(ref, 0.1))
    assert plain.item() == pytest.approx(1.1 + 0.1 * 0.3068528 / 4, abs=1e-6)
    assert corrected.item() == pytest.approx(1.1 + 0.1 * 1.5 * 0.3068528 / 4, abs=1e-6)
    assert stats.kl == pytest.approx(0.3068528, abs=1e-6)


def test_corrected_kl_has_the_gradient_of_the_kl() -> None:
    """Expectation over a small distribution: grad E[ratio * k3] = grad KL(pi || pi_ref); that of bare k3 is not."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), -1)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits)[0]

    new = torch.log_softmax(logits, -1)
    exact = gradient((new.exp() * (new - ref)).sum())
    for correction in (True, False):
        new = torch.log_softmax(logits, -1)
        # Each outcome is a sample of one token; the probability that it is drawn is its weight in the expectation.
        losses = [
            grpo_loss(
                new[i : i + 1],
                new[i : i + 1].detach(),
                torch.zeros(1),
                torch.tensor([1]),
                denominator=1,
                kl=KlTerm(ref[i : i + 1], 1.0, correction=correction),
            )[0]
            for i in range(3)
        ]
        estimate = gradient(sum(p * loss for p, loss in zip(new.exp().tolist(), losses, strict=True)))
        assert torch.allclose(estimate, exact, atol=1e-12) == correction


def test_rloo_by_hand() -> None:
    # sequence ratios: 1.5;  empty;  0.5 * 1.1 * 0.9 = 0.495. A = 1, 0, -2
    #   max(-1.5, -1.2) = -1.2 clipped;  0;  max(0.99, 1.6) = 1.6 clipped.  Sum 0.4 / 3 responses
    advantages = torch.tensor([1.0, 0.0, -2.0])
    loss, stats = rloo_loss(logprobs(), OLD, advantages, LENGTHS, denominator=3)
    assert loss.item() == pytest.approx(0.4 / 3)
    assert (stats.count, stats.tokens, stats.clipped) == (3, 4, 2)


def test_rloo_has_the_gradient_of_reinforce_on_policy() -> None:
    first = OLD.clone().requires_grad_()
    rloo_loss(first, OLD, ADVANTAGES, LENGTHS, denominator=3)[0].backward()
    assert first.grad is not None
    assert first.grad.tolist() == pytest.approx([-1 / 3, 2 / 3, 2 / 3, 2 / 3])


def test_ptx_by_hand() -> None:
    assert nll_loss(torch.tensor([-1.0, -2.0]), denominator=4).item() == 0.75


def test_a_micro_batch_of_empty_responses_is_worth_nothing() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    loss, stats = ppo_policy_loss(nothing, nothing, nothing, denominator=5)
    loss.backward()
    assert (loss.item(), stats.count, stats.ratio_max) == (0.0, 0.0, 0.0)
    assert value_loss(nothing, nothing, nothing, denominator=5)[0].item() == 0.0
    assert merge([stats, stats]).means()["clip_fraction"] == 0.0


@pytest.mark.parametrize("denominator", [0, -1, math.nan])
def test_a_denominator_that_is_not_a_count_is_refused(denominator: float) -> None:
    with pytest.raises(InvalidArgumentError, match="denominator"):
        nll_loss(torch.zeros(1), denominator=denominator)
