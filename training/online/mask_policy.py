"""The mask policy of NLPO (Ramamurthy et al. 2023): an older policy, from whose top-p sets the policy draws.

It is a copy of what training changes (an adapter, or all weights), not a second model: for its forward pass the values
change places with the policy's own, sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.parallel import sharded_like, whole


class MaskPolicy:
    """An older version of a policy's trained weights."""

    def __init__(self, policy: nn.Module, top_p: float, refresh_every: int) -> None:
        """Args:
        policy: as it is trained, sharded already; its weights now are the first mask policy.
        top_p: probability that the set of a token holds.
        refresh_every: steps after which the policy as it is then becomes the mask policy.
        """
        self.top_p = top_p
        self._refresh_every = refresh_every
        self._live = {name: one for name, one in policy.named_parameters() if one.requires_grad}
        self._kept = {name: _local(one).clone() for name, one in self._live.items()}

    @torch.no_grad()
    def after(self, steps: int) -> None:
        """Takes the policy's weights when so many steps end a period."""
        if steps % self._refresh_every == 0:
            for name, one in self._live.items():
                self._kept[name].copy_(_local(one))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy's parameters have the mask policy's values; nothing in here may need a gradient."""
        self._exchange()
        try:
            with torch.no_grad():
                yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, one in self._live.items():
            live, kept = _local(one), self._kept[name]
            before = live.clone()
            live.copy_(kept)
            kept.copy_(before)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, whole tensors; of several ranks all must call it."""
        with self.in_place():
            return {name: whole(one.data).clone() for name, one in self._live.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` gave, also on another number of ranks."""
        for name, one in self._live.items():
            self._kept[name].copy_(_local(sharded_like(state[name], one.data)))


def _local(value: Tensor) -> Tensor:
    """This rank's part; the same memory."""
    data = value.data
    return data.to_local() if isinstance(data, DTensor) else data
