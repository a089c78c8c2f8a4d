"""Several ranks under torchrun: layers sharded by FSDP2, everything else replicated.

    torchrun --nproc-per-node N -m training.stage ...

In the stage `rl` rank 0 talks to the services and gives every rank the whole batch; ranks share its micro-batches.
Embeddings, head and value head are small beside the layers and stay whole, so that `token_logprobs` sees a plain head.

A loss is a sum over a global count, so gradients of the ranks add up. FSDP averages them; `scale` makes up for it.
The stages that TRL trains are sharded by Accelerate, also with FSDP2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from steersman.nn.forward import layers_of
from training import RANKS_FILE

T = TypeVar("T")

_TIMEOUT = timedelta(hours=6)
"""Other ranks wait while rank 0 generates."""


@dataclass(frozen=True)
class Ranks:
    """This process among all; without torchrun it is the only one and nothing is communicated."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @staticmethod
    def join(device: str) -> Ranks:
        """Joins the process group that torchrun's environment describes."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return Ranks(device=device)
        meet(device)
        return Ranks(dist.get_rank(), world, device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def scale(self) -> float:
        """Factor of every loss."""
        return float(self.world)

    def shard(self, model: nn.Module) -> None:
        """Shards the layers of a transformers model, PEFT-wrapped or not, in place.

        Raises:
            ConfigError: a model whose layers are not found.
        """
        if self.world == 1:
            return
        mesh = init_device_mesh(self.device, (self.world,))
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank."""
        if self.world == 1:
            return make()
        box = [make() if self.is_first else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def share(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's part of the items; False marks repetitions that keep the ranks in step and must not count."""
        rounds = -(-len(items) // self.world)
        places = [turn * self.world + self.rank for turn in range(rounds)]
        return [(items[place], True) if place < len(items) else (items[0], False) for place in places]

    def add(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks of a CPU tensor, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def all(self, good: bool) -> bool:
        """Whether it is true on every rank."""
        return self.add(torch.tensor(0.0 if good else 1.0)).item() == 0.0

    def merge(self, stats: T) -> T:
        """Statistics of all ranks: fields named `*_max` by maximum, the others by sum."""
        if self.world == 1:
            return stats
        names = [field.name for field in fields(stats)]  # type: ignore[arg-type]
        columns = torch.zeros(self.world, len(names), dtype=torch.float64)
        columns[self.rank] = torch.tensor(astuple(stats), dtype=torch.float64)  # type: ignore[call-overload]
        dist.all_reduce(columns)
        values = [
            columns[:, index].max() if name.endswith("_max") else columns[:, index].sum()
            for index, name in enumerate(names)
        ]
        return type(stats)(*(value.item() for value in values))

    def finish_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the gradients of replicated parameters, as FSDP has done with those of sharded ones."""
        if self.world == 1:
            return
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Scales the gradients so that their global norm is at most `limit`; returns the norm before."""
        if self.world == 1:
            return torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sharded = torch.zeros((), dtype=torch.float64)
        whole = torch.zeros((), dtype=torch.float64)
        for gradient in gradients:
            if isinstance(gradient, DTensor):
                sharded += gradient.to_local().double().square().sum().cpu()
            else:
                whole += gradient.double().square().sum().cpu()
        norm = (self.add(sharded) + whole).sqrt().item()
        for gradient in gradients:
            gradient.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def meet(device: str) -> None:
    """Makes the process group of all ranks, once: through a file of this user's on one machine (`training.ranks`),
    otherwise through torchrun's store. Libraries that come later find it made."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # gloo carries Python objects and CPU tensors beside NCCL.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    file = os.environ.get(RANKS_FILE)
    if file is None:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, f"file://{file}", timeout=_TIMEOUT, rank=rank, world_size=world)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, the modules hold whole parameters; every rank must enter."""
    layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()


def whole(value: Any) -> Any:
    """The same nested value with every sharded tensor gathered; every rank must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor laid out as `like` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)
