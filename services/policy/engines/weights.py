"""The engine's weights: where each parameter lives, and how new ones are prepared and put in place.

Preparing (merging an adapter, casting, the layout that the CPU's kernels want) runs on the caller's thread while
generation goes on; putting in place only exchanges references, between two decode steps, and hands back what was
replaced, because to free it takes longer than all the rest. Nothing refers to an update's own tensors afterwards:
they may lie in a file that its owner takes away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from services.policy.engines.hardware import Layout, pack_weight, packed_linear
from steersman.errors import InvalidArgumentError
from steersman.generation import WeightsUpdate
from steersman.nn.hardware import array_of

Place = Callable[[], Any]
"""Puts prepared parameters in place; returns what nobody needs any more, to be let go when there is time."""

_PEFT_PREFIX = "base_model.model."
_STRIP = 32
"""Rows of a strip."""


class Source(Protocol):
    """What a parameter is made of."""

    @property
    def shape(self) -> torch.Size: ...

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The parameter, to be kept."""
        ...

    def into(self, out: Tensor) -> None:
        """Writes the parameter to `out`, which has its shape, any strides and any dtype."""
        ...


class Given:
    """A parameter as it was given."""

    def __init__(self, value: Tensor, *, own: bool, spare: Tensor | None = None) -> None:
        """
        Args:
            own: it may be served as it is; otherwise its memory is somebody else's.
            spare: memory for a copy, where it fits.
        """
        self.value = value
        self.copy: Tensor | None = None
        """To be served, of a value that is somebody else's."""
        self._own, self._spare = own, spare
        self._lock = threading.Lock()

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def tensor(self, dtype: torch.dtype) -> Tensor:
        if self._own:
            return self.value.to(dtype)
        with self._lock:  # a tied parameter has two holders, and shall exist once
            if self.copy is None:
                out = self._spare
                if out is None or (out.shape, out.dtype) != (self.shape, dtype):
                    out = torch.empty_like(self.value, dtype=dtype)
                self.copy = out.copy_(self.value)
            return self.copy

    def into(self, out: Tensor) -> None:
        if out.stride(0) != 1 or self.value.stride(0) == 1:
            out.copy_(self.value)
            return
        # A transposition: strips that stay in the processor's cache, too small for torch to split among threads.
        for start in range(0, len(out), _STRIP):
            out[start : start + _STRIP].copy_(self.value[start : start + _STRIP])


@dataclass(frozen=True, eq=False)
class Merged:
    """base + scale b a, computed in float32 from the base each time, so that nothing accumulates over many updates
    (Hu et al. 2021, section 4.1). The merged weight exists only where it is used.
    """

    base: Tensor
    """[out, in]"""
    b: Tensor
    """float32 [out, r]"""
    a: Tensor
    """float32 [r, in]"""
    scale: float

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def tensor(self, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype, device=self.base.device)
        self.into(out)
        return out

    def into(self, out: Tensor) -> None:
        base, b, a = self.base, self.b, self.a
        if out.stride(0) == 1:
            out, base, b, a = out.T, base.T, a.T, b.T
        if out.dtype == torch.float32:
            out.copy_(base).addmm_(b, a, alpha=self.scale)
        elif out.dtype == base.dtype == torch.bfloat16 and out.device.type == "cpu" and out.is_contiguous():
            _merge_rounded(base, b * self.scale, a, out)
        else:
            out.copy_(torch.addmm(base.float(), b, a, alpha=self.scale))


def _merge_rounded(base: Tensor, b: Tensor, a: Tensor, out: Tensor) -> None:
    """Rows of bfloat16 one after the other, in one pass over the memory."""
    from services.policy.engines import kernels  # compiles where nothing is cached

    padding = -len(a) % 4
    b, a = F.pad(b, (0, padding)), F.pad(a, (0, 0, 0, padding))
    arrays = [array_of(one.contiguous()) for one in (base, b, a)]
    kernels.merge(*arrays, array_of(out), torch.get_num_threads())


class Holder(Protocol):
    """Something that computes with one or more parameters."""

    names: tuple[str, ...]
    transposed: bool
    """Its matrices lie as [in, out]."""

    def prepare(self, sources: Sequence[Source | None], dtype: torch.dtype) -> Place:
        """Takes the parameters in the order of `names`; None: it stays as it is."""
        ...


class Parameter:
    """One parameter as it is, given to `place`."""

    transposed = False

    def __init__(self, name: str, place: Callable[[Tensor], object]) -> None:
        self.names: tuple[str, ...] = (name,)
        self._place = place

    def prepare(self, sources: Sequence[Source | None], dtype: torch.dtype) -> Place:
        (source,) = sources
        assert source is not None
        tensor = source.tensor(dtype)
        return lambda: self._place(tensor)


class Linear(nn.Module):
    """One or more linear layers of the same input, stacked, in a layout that is fast on this machine.

    Packed weights come with plain ones, which are faster for a single row.
    """

    weight: Tensor | None
    """plain and packed: [out, in]; transposed: [in, out]."""
    bias: Tensor | None
    packed: Tensor | None

    def __init__(self, weights: Sequence[str], biases: Sequence[str], layout: Layout) -> None:
        super().__init__()
        self.names: tuple[str, ...] = (*weights, *biases)
        self._stacked = len(weights)
        self._sizes: list[int] = []
        """Rows of each weight."""
        self._layout = layout
        self.transposed = layout == "transposed"
        self.weight = self.bias = self.packed = None
        self._spare: Tensor | None = None
        self._few_rows: _FewRows | None = None

    def prepare(self, sources: Sequence[Source | None], dtype: torch.dtype) -> Place:
        if not self._sizes:
            self._sizes = [source.shape[0] for source in sources[: self._stacked] if source is not None]
        given = [source or self._held(index) for index, source in enumerate(sources)]
        weights, biases = given[: self._stacked], given[self._stacked :]
        bias = torch.cat([one.tensor(dtype) for one in biases]) if biases else None
        packed = None
        if self.transposed:
            weight = self._filled(weights, dtype)
        else:
            tensors = [one.tensor(dtype) for one in weights]
            weight = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            packed = pack_weight(weight) if self._layout == "packed" else None
        few_rows = _FewRows(weight, bias) if dtype == torch.bfloat16 and weight.device.type == "cpu" else None

        def place() -> object:
            old = self.weight, self.bias, self.packed, self._few_rows
            if self.transposed:
                self._spare = self.weight
            self.weight, self.bias, self.packed, self._few_rows = weight, bias, packed, few_rows
            return old

        return place

    def _held(self, index: int) -> Source:
        """The parameter that is served now."""
        all_rows, part = self.bias, index - self._stacked
        if index < self._stacked:
            assert self.weight is not None
            all_rows, part = self.weight.T if self.transposed else self.weight, index
        assert all_rows is not None
        return Given(all_rows.split(self._sizes)[part], own=True)

    def _filled(self, sources: Sequence[Source], dtype: torch.dtype) -> Tensor:
        """[in, out] of all; in the memory of the weights before last, because fresh memory costs page faults."""
        weight = self._spare
        if weight is None:
            weight = torch.empty((sources[0].shape[1], sum(self._sizes)), dtype=dtype)
        for source, part in zip(sources, weight.split(self._sizes, 1), strict=True):
            source.into(part.T)
        return weight

    def _kernel(self, x: Tensor) -> Tensor | None:
        return None if _is_row(x) else self.packed

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        if self._few_rows is not None and _is_row(x):
            out = x.new_empty(1, sum(self._sizes), dtype=torch.float32)
            self._few_rows(x.reshape(1, -1).float(), out)
            return out.view(*x.shape[:-1], -1).to(x.dtype)
        packed = self._kernel(x)
        if packed is not None:
            return packed_linear(x, packed, self.bias)
        return F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)

    def into(self, x: Tensor, out: Tensor) -> None:
        """out = W x + b in float32, without the packed weight; [T, in], [T, out]."""
        assert self.weight is not None
        if self._few_rows is not None:
            self._few_rows(x, out)
            return
        weight = self.weight if self.transposed else self.weight.T
        if self.bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(self.bias, x, weight, out=out)

    def silu(self, x: Tensor) -> Tensor:
        """silu(W x + b)"""
        packed = self._kernel(x)
        return F.silu(self(x)) if packed is None else packed_linear(x, packed, self.bias, "swish")

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """(W x + b) * other"""
        packed = self._kernel(x)
        if packed is None:
            return self(x).mul_(other)
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, self.bias, "mul")

    def accumulate(self, x: Tensor, total: Tensor) -> Tensor:
        """total + W x + b; [T, in], [T, out]. `total` must not be used any more."""
        if self._few_rows is not None and x.dtype == torch.float32:
            self._few_rows(x, total, add=True)
            return total
        packed = self._kernel(x)
        if total.dtype != x.dtype:
            return total.add_(self(x))
        if packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, total, packed, self.bias, "add")
        assert self.weight is not None
        total.addmm_(x, self.weight if self.transposed else self.weight.T)
        return total if self.bias is None else total.add_(self.bias)


def _is_row(x: Tensor) -> bool:
    return x.numel() == x.shape[-1]


class _FewRows:
    """The product of a few rows with bfloat16 weights on a CPU; see `kernels.multiply`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from services.policy.engines import kernels  # compiles where nothing is cached

        self._multiply = kernels.multiply
        self._weight = array_of(weight.contiguous())
        self._bias = np.empty(0, np.float32) if bias is None else bias.float().numpy()

    def __call__(self, x: Tensor, out: Tensor, *, add: bool = False) -> None:
        """out = W x + b, or out += W x + b; float32 [T, in], [T, out]."""
        self._multiply(self._weight, self._bias, x.numpy(), out.numpy(), add, torch.get_num_threads())


class WeightStore:
    """All parameters by their transformers name: those of the start, which are not, and who computes with them."""

    def __init__(self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], dtype: torch.dtype) -> None:
        """
        Args:
            tensors: the parameters at the start, on the engine's device.
            aliases: other names of the same parameters (tied ones) -> name in `tensors`.
            dtype: what `holders` compute with; parameters of the start keep the checkpoint's.
        """
        self._base = {name: Given(tensor, own=True) for name, tensor in tensors.items()}
        self._changed: frozenset[str] = frozenset()
        """Parameters that updates have replaced."""
        self._copies: dict[str, Tensor] = {}
        self._spares: dict[str, Tensor] = {}
        """Copies that are served, and those before them, whose memory is used again; see `Linear._filled`."""
        self._aliases = aliases
        self._dtype = dtype
        self._holders: list[Holder] = []

    def name(self, name: str) -> str:
        return self._aliases.get(name, name)

    def attach(self, holder: Holder) -> None:
        """Registers a holder and gives it its parameters."""
        self.register(holder)
        self._prepare(holder, self._base)()

    def register(self, holder: Holder) -> None:
        """A holder that has the parameters of the start already."""
        self._holders.append(holder)
        if holder.transposed:
            for name in holder.names:
                base = self._base[name].value
                if base.dim() == 2:  # merging reads it as the holder's layout lies
                    self._base[name] = Given(base.T.contiguous().T, own=True)

    def linear(self, weights: Sequence[str], biases: Sequence[str], layout: Layout) -> Linear:
        """An attached `Linear`; a weight that is an embedding, too, stays as it is, so that it exists once."""
        tied = set(self._aliases.values())
        holder = Linear(weights, biases, "plain" if layout == "transposed" and not tied.isdisjoint(weights) else layout)
        self.attach(holder)
        return holder

    @torch.no_grad()
    def prepare(self, update: WeightsUpdate) -> Place:
        """Checks an update and prepares it.

        Raises:
            InvalidArgumentError: unknown names, wrong shapes, an adapter of a kind that cannot be merged.
        """
        if update.kind == "lora":  # on the parameters of the start
            changed = self._merged(update)
            sources: dict[str, Source] = {**{name: self._base[name] for name in self._changed}, **changed}
            after = frozenset(changed)
        else:
            sources = self._checked(update.tensors)
            after = self._changed.union(sources)
        holders = [holder for holder in self._holders if not sources.keys().isdisjoint(holder.names)]
        if update.kind == "lora":
            places = [self._prepare(holder, sources) for holder in holders]  # products, which use all threads
        else:
            with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="weights") as threads:
                places = list(threads.map(lambda holder: self._prepare(holder, sources), holders))

        def place() -> object:
            self._changed = after
            for name, source in sources.items():
                if isinstance(source, Given) and source.copy is not None:
                    if name in self._copies:
                        self._spares[name] = self._copies[name]
                    self._copies[name] = source.copy
            return [one() for one in places]

        return place

    @torch.no_grad()
    def _prepare(self, holder: Holder, sources: Mapping[str, Source]) -> Place:
        return holder.prepare([sources.get(name) for name in holder.names], self._dtype)

    def _parameter(self, name: str, shape: torch.Size, given: str) -> tuple[str, Tensor]:
        own = self.name(name)
        if own not in self._base:
            raise InvalidArgumentError(f"the weights update holds '{given}', which the served model does not have")
        base = self._base[own].value
        if base.shape != shape:
            raise InvalidArgumentError(
                f"'{given}' has shape {list(shape)} in the weights update, the served model has {list(base.shape)}"
            )
        return own, base

    def _checked(self, tensors: Mapping[str, Tensor]) -> dict[str, Source]:
        if not tensors:
            raise InvalidArgumentError("the weights update holds no tensors")
        checked: dict[str, Source] = {}
        for given, tensor in tensors.items():
            name, base = self._parameter(given, tensor.shape, given)
            if name == given or name not in tensors:
                there = tensor.to(base.device)
                checked[name] = Given(there, own=there is not tensor, spare=self._spares.get(name))
        return checked

    def _merged(self, update: WeightsUpdate) -> dict[str, Source]:
        """Base + scale * B A for every adapted module."""
        config = update.adapter_config
        if config is None:
            raise InvalidArgumentError("the LoRA update has no adapter_config, send PEFT's adapter_config.json")
        if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
            kind = "DoRA" if config.get("use_dora") else config["peft_type"]
            raise InvalidArgumentError(f"the adapter is of type {kind}, only LoRA can be merged; send full weights")
        changed: dict[str, Source] = {}
        for module, a, b, plain in _lora_parts(update.tensors):
            if plain is not None:
                changed |= self._checked({module: plain})
                continue
            if a is None or b is None:
                raise InvalidArgumentError(f"the LoRA update holds only one of lora_A and lora_B of '{module}'")
            scale = _scale(config, module, a.shape[0])
            if config.get("fan_in_fan_out"):
                a, b = b.T, a.T
            name, base = self._parameter(f"{module}.weight", torch.Size((b.shape[0], a.shape[1])), module)
            if name in changed:
                base = changed[name].tensor(torch.float32)
            changed[name] = Merged(base, b.to(base.device, torch.float32), a.to(base.device, torch.float32), scale)
        if not changed:
            raise InvalidArgumentError("the LoRA update holds no tensors")
        return changed


def attach_parameters(model: nn.Module, store: WeightStore, held: Set[str]) -> None:
    """Gives the modules of a model the store's parameters as they are, but for those that something else holds."""
    for module_name, module in model.named_modules():
        for attribute, value in list(module._parameters.items()):
            name = f"{module_name}.{attribute}" if module_name else attribute
            if value is not None and name not in held:
                store.attach(Parameter(store.name(name), _setter(module._parameters, attribute)))


def _setter(parameters: dict[str, nn.Parameter | None], attribute: str) -> Callable[[Tensor], object]:
    def place(tensor: Tensor) -> object:
        old = parameters[attribute]
        parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        return old

    return place


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


def adapted_modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the modules that an adapter changes."""
    return [name for name, a, b, _ in _lora_parts(tensors) if a is not None and b is not None]


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha: float = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
