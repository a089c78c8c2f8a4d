"""Rewards of one's own, with the signature of TRL's reward functions: lists over the batch, None says nothing."""

from __future__ import annotations

from typing import Any


def ends_with_a_sentence(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1 where the answer ends as sentences do."""
    return [float(completion[0]["content"].rstrip().endswith((".", "!", "?"))) for completion in completions]


def near_length(completions: list[list[dict[str, str]]], *, words: int = 20, **columns: Any) -> list[float | None]:
    """1 at `words` words, less the further away; nothing is said of an empty answer."""
    counts = [len(completion[0]["content"].split()) for completion in completions]
    return [1.0 / (1.0 + abs(count - words) / words) if count else None for count in counts]
