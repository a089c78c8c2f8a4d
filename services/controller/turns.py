"""Whose turn it is to take hardware, so that runs never wait for one another in a circle. Pure.

A stage with services, or with several ranks, takes its hardware pod by pod: a run that has some of it and waits for
the rest would block another one that does the same. So one run takes at a time, and one that is not at its turn holds
nothing. What the taking run waits for is then held only by runs that have all they need, and these end or give it
back without needing more: a circle cannot close.

    None ── needs several pods ──> Waiting ── turn ──> Acquiring ── all pods run ──> Holding ── stage ends ──> None
                                      ^───────── a pod finds no room, and another is taking ──────┘

With Kueue this order is not needed: its queue admits a stage with all its pods or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Turn = Literal["Waiting", "Acquiring", "Holding"]


@dataclass(frozen=True)
class Peer:
    """Another run, as far as the turn is concerned."""

    name: str
    order: tuple[str, str]
    """Creation time and uid: who came first."""
    turn: Turn | None
    """None: it needs nothing now."""


def next_turn(mine: Turn | None, order: tuple[str, str], peers: Sequence[Peer], *, starved: bool) -> Turn:
    """The state of a run that needs several pods.

    Args:
        mine: its state at the last look.
        order: its place in the queue.
        peers: the other runs on the same hardware.
        starved: one of its pods finds no room.
    """
    taking = [peer for peer in peers if peer.turn == "Acquiring"]
    if mine == "Holding" and not starved:
        return "Holding"
    if mine == "Acquiring":
        # Two that began in the same moment: the later one gives way.
        return "Waiting" if any(peer.order < order for peer in taking) else "Acquiring"
    if taking or any(peer.turn == "Waiting" and peer.order < order for peer in peers):
        return "Waiting"
    return "Acquiring"


def blocker(order: tuple[str, str], peers: Sequence[Peer]) -> str:
    """Name of the run that is waited for; empty: none."""
    taking = [peer.name for peer in peers if peer.turn == "Acquiring"]
    earlier = [peer.name for peer in sorted(peers, key=lambda peer: peer.order) if peer.turn == "Waiting"]
    return next(iter([*taking, *earlier]), "")
