"""Rewards that are computed, not learned, registered by name.

A reward is built once from its options and then called with the prompt's messages, the answer's text and what the row
knows. It returns a value and, where it has them, the criteria behind it.
"""

from steersman.rewards.custom import custom_reward, split_reference
from steersman.rewards.registry import (
    Answered,
    BatchReward,
    Failed,
    Outcome,
    Reward,
    Verdict,
    build_batch_reward,
    build_reward,
    check_reward,
    register,
    register_batch,
    registered,
)

__all__ = [
    "Answered",
    "BatchReward",
    "Failed",
    "Outcome",
    "Reward",
    "Verdict",
    "build_batch_reward",
    "build_reward",
    "check_reward",
    "custom_reward",
    "register",
    "register_batch",
    "registered",
    "split_reference",
]
