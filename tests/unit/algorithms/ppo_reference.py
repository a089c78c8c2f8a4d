"""An independent reference of PPO in plain numpy fp64, after the details of lm-human-preferences.

Written from `compute_rewards`, `loss`, `whiten` and the KL controller in openai/lm-human-preferences
(lm_human_preferences/train_policy.py, utils/core.py), and from vwxyzjn/summarize_from_feedback_details
(ppo_left_padding.py). Those work on [N, L] with one response length; a ragged batch is the same arithmetic on each
response at its own length, so here every per-token quantity is a list of N arrays. Loops and scalars on purpose:
nothing is shared with the code under test.
"""

from __future__ import annotations

import math

import numpy as np

Rows = list[np.ndarray]


def compute_rewards(scores: np.ndarray, logprobs: Rows, ref_logprobs: Rows, kl_coef: float) -> Rows:
    rewards = []
    for score, row, ref in zip(scores, logprobs, ref_logprobs, strict=True):
        reward = np.array([-kl_coef * (a - b) for a, b in zip(row, ref, strict=True)])
        if len(reward):
            reward[-1] += score
        rewards.append(reward)
    return rewards


def whiten(rows: Rows, shift_mean: bool = True) -> Rows:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / len(flat)
    scale = 1 / math.sqrt(variance + 1e-8)
    return [np.array([(x - mean) * scale + (0 if shift_mean else mean) for x in row]) for row in rows]


def gae(rewards: Rows, values: Rows, gamma: float, lam: float) -> tuple[Rows, Rows]:
    advantages, returns = [], []
    for reward, value in zip(rewards, values, strict=True):
        length = len(reward)
        advantage = np.zeros(length)
        carry = 0.0
        for t in reversed(range(length)):
            following = value[t + 1] if t < length - 1 else 0.0
            delta = reward[t] + gamma * following - value[t]
            carry = delta + gamma * lam * carry
            advantage[t] = carry
        advantages.append(advantage)
        returns.append(advantage + value)
    return advantages, returns


def losses(
    logprobs: Rows,
    old_logprobs: Rows,
    advantages: Rows,
    values: Rows,
    old_values: Rows,
    returns: Rows,
    cliprange: float,
    cliprange_value: float,
) -> dict[str, float]:
    total = {"policy": 0.0, "value": 0.0, "clipfrac": 0.0, "value_clipfrac": 0.0, "approxkl": 0.0, "error": 0.0}
    count = 0
    for row in zip(logprobs, old_logprobs, advantages, values, old_values, returns, strict=True):
        for logp, old_logp, advantage, value, old_value, target in zip(*row, strict=True):
            ratio = math.exp(logp - old_logp)
            first = -advantage * ratio
            second = -advantage * min(max(ratio, 1 - cliprange), 1 + cliprange)
            total["policy"] += max(first, second)
            total["clipfrac"] += second > first
            total["approxkl"] += 0.5 * (logp - old_logp) ** 2
            clipped = min(max(value, old_value - cliprange_value), old_value + cliprange_value)
            error, clipped_error = (value - target) ** 2, (clipped - target) ** 2
            total["value"] += 0.5 * max(error, clipped_error)
            total["value_clipfrac"] += clipped_error > error
            total["error"] += error
            count += 1
    return {name: value / count for name, value in total.items()}


def adaptive_kl(coefficient: float, current: float, target: float, n_steps: int, horizon: int) -> float:
    error = float(np.clip(current / target - 1, -0.2, 0.2))
    return coefficient * (1 + error * n_steps / horizon)
