"""Rewards that are computed, not learned, registered by name.

A reward is built once from its options and then called with the prompt's messages, the answer's text
and the row's `facts`. It returns a value and, where it has them, the criteria behind it.
"""

from steersman.rewards.registry import Reward, Verdict, build_reward, check_reward, register, registered

__all__ = ["Reward", "Verdict", "build_reward", "check_reward", "register", "registered"]
