"""The engine's weights: where each parameter lives, and how new ones are prepared and put in place.

Preparing (merging an adapter, casting, the CPU kernels' layout) runs on the caller's thread while generation goes
on; putting in place only exchanges references, between two decode steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from services.policy.engines.hardware import pack_weight, packed_linear
from steersman.errors import InvalidArgumentError
from steersman.generation import WeightsUpdate

_PEFT_PREFIX = "base_model.model."


class Holder(Protocol):
    """Something that computes with one or more parameters."""

    names: tuple[str, ...]

    def prepare(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Takes the parameters in the order of `names`; the function that it returns puts them in place."""
        ...


class Parameter:
    """One parameter as it is, given to `place`."""

    def __init__(self, name: str, place: Callable[[Tensor], None]) -> None:
        self.names: tuple[str, ...] = (name,)
        self._place = place

    def prepare(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        return lambda: self._place(tensors[0])


class Linear(nn.Module):
    """One or more linear layers of the same input, stacked, in the layout that is fast on this machine.

    float32 with a single row is faster with the plain weight; all else with the packed one.
    """

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None

    def __init__(self, weights: Sequence[str], biases: Sequence[str], pack: bool) -> None:
        super().__init__()
        self.names: tuple[str, ...] = (*weights, *biases)
        self._stacked = len(weights)
        self._pack = pack
        self.bias = self.packed = None

    def prepare(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        weights, biases = tensors[: self._stacked], tensors[self._stacked :]
        weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
        bias = torch.cat(tuple(biases)) if biases else None
        packed = pack_weight(weight) if self._pack else None

        def place() -> None:
            self.weight, self.bias, self.packed = weight, bias, packed

        return place

    def _kernel(self, x: Tensor) -> Tensor | None:
        if self.packed is None or (x.numel() == x.shape[-1] and x.dtype == torch.float32):
            return None
        return self.packed

    def forward(self, x: Tensor) -> Tensor:
        packed = self._kernel(x)
        return F.linear(x, self.weight, self.bias) if packed is None else packed_linear(x, packed, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        """silu(W x + b)"""
        packed = self._kernel(x)
        return F.silu(self(x)) if packed is None else packed_linear(x, packed, self.bias, "swish")

    def combine(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        """(W x + b) "mul" or "add" other"""
        packed = self._kernel(x)
        if packed is None or other.dtype != x.dtype:
            y = self(x)
            return other * y if operation == "mul" else other + y
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, self.bias, operation)


class WeightStore:
    """All parameters by their transformers name: those of the start, those in use, and who computes with them."""

    def __init__(self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], dtype: torch.dtype) -> None:
        """
        Args:
            tensors: the parameters at the start, on the engine's device.
            aliases: other names of the same parameters (tied ones) -> name in `tensors`.
            dtype: what `holders` compute with; parameters of the start keep the checkpoint's.
        """
        self._base = dict(tensors)
        self._current = dict(tensors)
        self._aliases = dict(aliases)
        self._dtype = dtype
        self._holders: list[Holder] = []

    def name(self, name: str) -> str:
        return self._aliases.get(name, name)

    def attach(self, holder: Holder) -> None:
        """Registers a holder and gives it its parameters."""
        self._holders.append(holder)
        holder.prepare(self._gather(holder, self._current))()

    @torch.no_grad()
    def prepare(self, update: WeightsUpdate) -> Callable[[], None]:
        """Checks an update and prepares it; the returned function puts it in place.

        Raises:
            InvalidArgumentError: unknown names, wrong shapes, an adapter of a kind that cannot be merged.
        """
        if update.kind == "lora":
            changed = self._merged(update)
            target = self._base | changed
        else:
            changed = self._checked(update.tensors)
            target = self._current | changed
        # What is given counts as new even when it is the same object: its content may have changed.
        stale = changed.keys() | {name for name, tensor in target.items() if tensor is not self._current[name]}
        places = [
            holder.prepare(self._gather(holder, target))
            for holder in self._holders
            if not stale.isdisjoint(holder.names)
        ]

        def place() -> None:
            for one in places:
                one()
            self._current = target

        return place

    def _gather(self, holder: Holder, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[name].to(self._dtype) for name in holder.names]

    def _parameter(self, name: str, shape: torch.Size | None, given: str) -> tuple[str, Tensor]:
        own = self.name(name)
        base = self._base.get(own)
        if base is None:
            raise InvalidArgumentError(f"the weights update holds '{given}', which the served model does not have")
        if shape is not None and base.shape != shape:
            raise InvalidArgumentError(
                f"'{given}' has shape {list(shape)} in the weights update, the served model has {list(base.shape)}"
            )
        return own, base

    def _checked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not tensors:
            raise InvalidArgumentError("the weights update holds no tensors")
        checked: dict[str, Tensor] = {}
        for given, tensor in tensors.items():
            name, base = self._parameter(given, tensor.shape, given)
            if name == given or name not in tensors:
                checked[name] = tensor.to(device=base.device, dtype=self._dtype)
        return checked

    def _merged(self, update: WeightsUpdate) -> dict[str, Tensor]:
        """Base + scale * B A for every adapted module, computed in float32 (Hu et al. 2021, section 4.1)."""
        config = update.adapter_config
        if config is None:
            raise InvalidArgumentError("the LoRA update has no adapter_config, send PEFT's adapter_config.json")
        if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
            kind = "DoRA" if config.get("use_dora") else config["peft_type"]
            raise InvalidArgumentError(f"the adapter is of type {kind}, only LoRA can be merged; send full weights")
        changed: dict[str, Tensor] = {}
        for module, a, b, plain in _lora_parts(update.tensors):
            if plain is not None:
                changed |= self._checked({module: plain})
                continue
            if a is None or b is None:
                raise InvalidArgumentError(f"the LoRA update holds only one of lora_A and lora_B of '{module}'")
            delta_shape = torch.Size((b.shape[0], a.shape[1]))
            transposed = bool(config.get("fan_in_fan_out"))
            shape = torch.Size(reversed(delta_shape)) if transposed else delta_shape
            name, base = self._parameter(f"{module}.weight", shape, module)
            base = changed.get(name, base)
            a, b = a.to(base.device, torch.float32), b.to(base.device, torch.float32)
            delta = b * _scale(config, module, a.shape[0])
            merged = torch.addmm(base.float().T if transposed else base.float(), delta, a)
            changed[name] = (merged.T if transposed else merged).to(self._dtype)
        if not changed:
            raise InvalidArgumentError("the LoRA update holds no tensors")
        return changed


def _lora_parts(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor | None, Tensor | None, Tensor | None]]:
    """(module or parameter name, A [r, in], B [out, r], plain tensor) of a PEFT state dict."""
    pairs: dict[str, list[Tensor | None]] = {}
    for given, tensor in tensors.items():
        name = given.removeprefix(_PEFT_PREFIX).replace(".default", "")
        for marker, index, transpose in (
            (".lora_A.weight", 0, False),
            (".lora_B.weight", 1, False),
            (".lora_embedding_A", 1, True),  # an embedding is W[token]: its weight grows by (B A)^T
            (".lora_embedding_B", 0, True),
        ):
            if name.endswith(marker):
                pair = pairs.setdefault(name.removesuffix(marker), [None, None])
                pair[index] = tensor.T if transpose else tensor
                break
        else:
            if ".lora_" in name:
                raise InvalidArgumentError(
                    f"the LoRA update holds '{given}', which cannot be merged; send full weights"
                )
            yield name.replace(".modules_to_save", "").replace(".base_layer", ""), None, None, tensor
    for module, (a, b) in pairs.items():
        yield module, a, b, None


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha: float = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
