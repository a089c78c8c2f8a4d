"""HH-RLHF's transcripts: one text for a whole conversation."""

from __future__ import annotations

import re
from typing import Any

from steersman.data.format import Skip, message

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_HUMAN, _HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_last_turn(chosen: str, rejected: str) -> dict[str, Any] | None:
    """The short way for nearly every pair, in which only the last assistant turn differs; None for the others."""
    cut = chosen.rfind(_HH_ASSISTANT)
    if cut < 0 or cut != rejected.rfind(_HH_ASSISTANT):
        return None
    shared = chosen[:cut]
    if not rejected.startswith(shared) or chosen.find(_HH_HUMAN, cut) >= 0 or rejected.find(_HH_HUMAN, cut) >= 0:
        return None
    prompt = hh_turns(shared)
    if not prompt or prompt[-1]["role"] != "user":
        return None
    behind = cut + len(_HH_ASSISTANT)
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen[behind:].strip()}],
        "rejected": [{"role": "assistant", "content": rejected[behind:].strip()}],
    }


def hh_common_prefix(chosen: str, rejected: str) -> dict[str, Any] | Skip:
    """The general way: common turns up to a human turn, whatever follows on either side."""
    ours, theirs = hh_turns(chosen), hh_turns(rejected)
    shared = 0
    for our, their in zip(ours, theirs, strict=False):
        if our != their:
            break
        shared += 1
    while shared and ours[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        return Skip("chosen and rejected share no human turn")
    if shared in (len(ours), len(theirs)):
        return Skip("a transcript does not end with an assistant turn")
    return {"prompt": ours[:shared], "chosen": ours[shared:], "rejected": theirs[shared:]}


def hh_turns(transcript: str) -> list[dict[str, Any]]:
    """Turns of an HH transcript; consecutive turns of one role are joined, "Human:" inside a line stays text."""
    parts = _HH_TURN.split(transcript)
    turns: list[dict[str, Any]] = []
    for index in range(1, len(parts), 2):
        role, text = _HH_ROLES[parts[index]], parts[index + 1].strip()
        if turns and turns[-1]["role"] == role:
            turns[-1] = message(role, f"{turns[-1]['content']}\n\n{text}".strip())
        else:
            turns.append({"role": role, "content": text})
    return turns
