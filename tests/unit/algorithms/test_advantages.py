"""Advantage estimators on numbers worked by hand, and their algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman.errors import InvalidArgumentError
from training.mathematics.advantages import gae, grpo, reinforce, rloo, to_tokens
from training.mathematics.moments import Moments


def test_gae_by_hand() -> None:
    # gamma 1, lambda 0.5; rewards 0, 1; values 0.5, 0.25
    # delta_1 = 1 + 0 - 0.25 = 0.75;  delta_0 = 0 + 0.25 - 0.5 = -0.25
    # A_1 = 0.75;  A_0 = -0.25 + 0.5 * 0.75 = 0.125;  returns = A + V = 0.625, 1.0
    # then an empty response, then one token: reward 2, value 3: A = -1, return 2
    rewards, values = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.25, 3.0])
    advantages, returns = gae(rewards, values, torch.tensor([2, 0, 1]), gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([0.125, 0.75, -1.0]))
    torch.testing.assert_close(returns, torch.tensor([0.625, 1.0, 2.0]))


def test_gae_with_a_discount_by_hand() -> None:
    # gamma 0.5, lambda 1: returns are discounted rewards: 1 + 0.5 * 2 + 0.25 * 4 = 3;  2 + 0.5 * 4 = 4;  4
    rewards, values = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([9.0, -9.0, 5.0])
    advantages, returns = gae(rewards, values, torch.tensor([3]), gamma=0.5, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([3.0, 4.0, 4.0]))
    torch.testing.assert_close(advantages, torch.tensor([-6.0, 13.0, -1.0]))


def test_gae_of_only_empty_responses() -> None:
    advantages, returns = gae(torch.zeros(0), torch.zeros(0), torch.tensor([0, 0]))
    assert advantages.shape == returns.shape == (0,)


def test_rloo_by_hand() -> None:
    # group 7: rewards 1, 2, 6: baselines 4, 3.5, 1.5; group 3: one sample; group 5: 0, 1
    rewards = torch.tensor([1.0, 9.0, 2.0, 0.0, 6.0, 1.0])
    group = torch.tensor([7, 3, 7, 5, 7, 5])
    torch.testing.assert_close(rloo(rewards, group), torch.tensor([-3.0, 0.0, -1.5, -1.0, 4.5, 1.0]))


def test_grpo_by_hand() -> None:
    # group 0: 1, 2, 3: mean 2, unbiased std 1; group 1: equal rewards; group 2: one sample
    rewards, group = torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0, 8.0]), torch.tensor([0, 0, 0, 1, 1, 2])
    scaled = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]) / (1 + 1e-4)
    torch.testing.assert_close(grpo(rewards, group), scaled)
    plain = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(grpo(rewards, group, scale_by_std=False), plain)


def test_reinforce_by_hand() -> None:
    assert reinforce(torch.tensor([1.0, 2.0, 6.0])).tolist() == [-2.0, -1.0, 3.0]
    # the mean of the global batch: 4 samples, sum 8
    assert reinforce(torch.tensor([1.0]), Moments(4, 8.0, 30.0)).tolist() == [-1.0]


def test_to_tokens() -> None:
    assert to_tokens(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 1])).tolist() == [1.0, 1.0, 3.0]


groups = st.lists(st.tuples(st.integers(0, 4), st.floats(-50, 50, width=32)), min_size=1, max_size=20)


@given(groups, st.randoms(use_true_random=False))
def test_group_advantages_do_not_depend_on_order_or_ids(samples: list[tuple[int, float]], random) -> None:
    group = torch.tensor([index for index, _ in samples])
    rewards = torch.tensor([reward for _, reward in samples], dtype=torch.float64)
    order = list(range(len(samples)))
    random.shuffle(order)
    for estimate in (rloo, grpo, lambda r, g: grpo(r, g, scale_by_std=False)):
        result = estimate(rewards, group)
        torch.testing.assert_close(estimate(rewards[order], group[order]), result[order], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(estimate(rewards, 1000 - 7 * group), result, rtol=1e-9, atol=1e-9)


@given(groups)
def test_group_advantages_sum_to_zero_and_forget_the_offset(samples: list[tuple[int, float]]) -> None:
    group = torch.tensor([index for index, _ in samples])
    rewards = torch.tensor([reward for _, reward in samples], dtype=torch.float64)
    for estimate in (rloo, lambda r, g: grpo(r, g, scale_by_std=False)):
        result = estimate(rewards, group)
        for index in set(group.tolist()):
            assert result[group == index].sum().item() == pytest.approx(0.0, abs=1e-8)
        torch.testing.assert_close(estimate(rewards + 1000.0, group), result, rtol=1e-6, atol=1e-8)


@given(groups)
def test_rloo_is_the_centred_reward_times_k_over_k_minus_one(samples: list[tuple[int, float]]) -> None:
    group = torch.tensor([index for index, _ in samples])
    rewards = torch.tensor([reward for _, reward in samples], dtype=torch.float64)
    size = torch.tensor([(group == index).sum() for index in group.tolist()])
    centred = grpo(rewards, group, scale_by_std=False)
    torch.testing.assert_close(rloo(rewards, group), centred * size / (size - 1).clamp(min=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimate", [rloo, grpo, lambda r, g: reinforce(r)])
def test_a_missing_reward_must_be_excluded_first(estimate) -> None:
    with pytest.raises(InvalidArgumentError, match="missing"):
        estimate(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
