"""The terms of ILQL: numbers worked by hand, an independent numpy reference, and invariance to order and split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from training.mathematics.ilql import ActionValues, IlqlStats, ilql_loss, move_targets, next_values
from training.mathematics.stats import merge

OPTIONS = {"gamma": 0.9, "lam": 0.0, "tau": 0.7, "cql": 0.5, "lm": 2.0, "lm_beta": 0.0}


def values_of(**given: Tensor) -> ActionValues:
    return ActionValues(**given)


def test_two_actions_by_hand() -> None:
    """One conversation of two actions; reward 1 behind the second.

    y = (0 + 0.9 * 0.5, 1) = (0.45, 1);  u = min target - V = (0.5 - 0.2, 0.1 - 0.5) = (0.3, -0.4)
    L_Q  = (0.4 - 0.45)^2 + (0.8 - 1)^2 + (0.2 - 0.45)^2 + (1.2 - 1)^2 = 0.0025 + 0.04 + 0.0625 + 0.04 = 0.145
    L_V  = 0.7 * 0.3^2 + 0.3 * 0.4^2 = 0.063 + 0.048 = 0.111
    L_CQL = 1 + 2 + 3 + 4 = 10,  L_LM = 0.5 + 1.5 = 2
    L = (0.145 + 0.111 + 0.5 * 10 + 2 * 2) / 2 = 4.628
    """
    values = values_of(
        logprobs=torch.tensor([-0.5, -1.5]),
        q=torch.tensor([[0.4, 0.8], [0.2, 1.2]]),
        q_logprobs=torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]),
        target_q=torch.tensor([[0.5, 0.9], [0.6, 0.1]]),
        v=torch.tensor([0.2, 0.5]),
    )
    loss, stats = ilql_loss(values, torch.tensor([0.0, 1.0]), torch.tensor([2]), denominator=2, **OPTIONS)
    assert loss.item() == pytest.approx(4.628, abs=1e-6)
    assert stats.loss_q == pytest.approx(0.145, abs=1e-6)
    assert stats.loss_v == pytest.approx(0.111, abs=1e-6)
    assert stats.loss_cql == pytest.approx(10.0, abs=1e-6)
    assert stats.loss_lm == pytest.approx(2.0, abs=1e-6)
    assert stats.means()["advantage"] == pytest.approx(-0.05, abs=1e-6)


@pytest.mark.parametrize(("lam", "first"), [(0.0, 0.45), (0.5, 0.675), (1.0, 0.9)])
def test_a_return_reaches_the_first_action_at_once_with_lambda(lam: float, first: float) -> None:
    """The same two actions: y_2 = 1, y_1 = 0 + 0.9 ((1 - lambda) 0.5 + lambda 1)."""
    values = values_of(
        logprobs=torch.zeros(2),
        q=torch.zeros(2, 2),
        q_logprobs=torch.zeros(2, 2),
        target_q=torch.zeros(2, 2),
        v=torch.tensor([0.2, 0.5]),
    )
    options = {**OPTIONS, "lam": lam}
    _, stats = ilql_loss(values, torch.tensor([0.0, 1.0]), torch.tensor([2]), denominator=1, **options)
    assert stats.loss_q == pytest.approx(2 * (first**2 + 1.0), rel=1e-6)


def test_the_language_model_term_weighs_by_the_advantage() -> None:
    """exp(2 * 0.3) * 0.5 + exp(2 * -0.4) * 1.5."""
    values = values_of(
        logprobs=torch.tensor([-0.5, -1.5], requires_grad=True),
        q=torch.zeros(2, 2),
        q_logprobs=torch.zeros(2, 2),
        target_q=torch.tensor([[0.5, 0.9], [0.6, 0.1]]),
        v=torch.tensor([0.2, 0.5], requires_grad=True),
    )
    options = {**OPTIONS, "lm": 1.0, "lm_beta": 2.0}
    loss, stats = ilql_loss(values, torch.zeros(2), torch.tensor([2]), denominator=1, **options)
    assert stats.loss_lm == pytest.approx(np.exp(0.6) * 0.5 + np.exp(-0.8) * 1.5, rel=1e-6)
    loss.backward()
    # The weight carries no gradient: V's is that of the expectile regression alone, -2 w u.
    assert values.v.grad.tolist() == pytest.approx([-2 * 0.7 * 0.3, 2 * 0.3 * 0.4], rel=1e-5)
    assert values.logprobs.grad.tolist() == pytest.approx([-np.exp(0.6), -np.exp(-0.8)], rel=1e-6)


def test_nothing_follows_the_last_action_of_a_conversation() -> None:
    v = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert next_values(v, torch.tensor([3, 1, 0, 2])).tolist() == [2.0, 3.0, 0.0, 0.0, 6.0, 0.0]
    assert next_values(torch.zeros(0), torch.tensor([0, 0])).tolist() == []


def reference(logits, qs, targets, vs, actions, rewards, gamma, lam, tau, cql, lm, lm_beta) -> float:
    """The same in numpy fp64 over padded arrays, written after the paper's equations, token by token."""
    total, count = 0.0, 0
    for row in range(len(actions)):
        length = len(actions[row])
        y = 0.0
        for t in reversed(range(length)):
            a = actions[row][t]
            following = vs[row][t + 1] if t + 1 < length else 0.0
            y = rewards[row][t] + gamma * ((1 - lam) * following + lam * y)
            u = min(target[row][t, a] for target in targets) - vs[row][t]
            loss = (tau if u >= 0 else 1 - tau) * u**2
            for q in qs:
                loss += (q[row][t, a] - y) ** 2
                loss += cql * (np.log(np.exp(q[row][t]).sum()) - q[row][t, a])
            logp = logits[row][t, a] - np.log(np.exp(logits[row][t]).sum())
            total += loss - lm * np.exp(lm_beta * u) * logp
            count += 1
    return total / count


@pytest.fixture
def problem():
    draw = np.random.default_rng(3)
    lengths, vocab = [3, 1, 5], 7
    table = lambda: [draw.normal(size=(n, vocab)) for n in lengths]  # noqa: E731
    actions = [draw.integers(0, vocab, n) for n in lengths]
    rewards = [draw.normal(size=n) for n in lengths]
    values = [draw.normal(size=n) for n in lengths]
    return lengths, table(), [table(), table()], [table(), table()], values, actions, rewards


def packed(problem, rows: list[int]) -> tuple[ActionValues, Tensor, Tensor]:
    _, logits, qs, targets, vs, actions, rewards = problem
    index = torch.tensor(np.concatenate([actions[row] for row in rows]))[:, None]
    take = lambda tables: torch.tensor(np.concatenate([tables[row] for row in rows]))  # noqa: E731
    values = ActionValues(
        logprobs=take(logits).log_softmax(-1).gather(1, index)[:, 0],
        q=torch.stack([take(q).gather(1, index)[:, 0] for q in qs]),
        q_logprobs=torch.stack([take(q).log_softmax(-1).gather(1, index)[:, 0] for q in qs]),
        target_q=torch.stack([take(q).gather(1, index)[:, 0] for q in targets]),
        v=take(vs),
    )
    return values, take(rewards), torch.tensor([len(actions[row]) for row in rows])


@pytest.mark.parametrize(("lm_beta", "lam"), [(0.0, 0.0), (1.5, 0.0), (0.0, 1.0), (1.5, 0.6)])
def test_the_loss_equals_an_independent_reference_whatever_the_split(problem, lm_beta: float, lam: float) -> None:
    options = {**OPTIONS, "lm_beta": lm_beta, "lam": lam}
    wanted = reference(*problem[1:], **options)
    count = float(sum(problem[0]))
    for split in ([[0, 1, 2]], [[2, 0], [1]], [[1], [2], [0]]):
        found = [ilql_loss(*packed(problem, rows), denominator=count, **options) for rows in split]
        assert sum(loss.item() for loss, _ in found) == pytest.approx(wanted, rel=1e-12)
        merged = merge([IlqlStats(), *(stats for _, stats in found)])
        assert merged.means()["loss"] == pytest.approx(wanted, rel=1e-12)


def test_targets_move_by_their_share() -> None:
    targets, heads = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]
    move_targets(targets, heads, 0.25)
    assert targets[0].tolist() == [1.5, 1.5]
    move_targets(targets, heads, 1.0)
    assert targets[0].tolist() == heads[0].tolist()
