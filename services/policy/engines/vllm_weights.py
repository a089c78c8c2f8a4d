"""The vLLM engine's weights as files: the checkpoint of the start, and what updates laid over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from services.policy.engines.weights import Place, Source, WeightStore, adapted_modules
from steersman.errors import InvalidArgumentError, StorageError, why
from steersman.generation import WeightsUpdate
from steersman.nn.encoder_decoder import language_model_class


@dataclass(frozen=True, slots=True)
class Plan:
    """Which file holds each parameter after an update."""

    paths: Mapping[str, str]
    """Path by parameter name, as in the checkpoint; all parameters are there."""
    commit: Callable[[], None]
    """To be called when the engine uses the weights."""

    def files(self) -> dict[str, list[str]]:
        """Parameter names by path."""
        found: dict[str, list[str]] = {}
        for name, path in self.paths.items():
            found.setdefault(path, []).append(name)
        return found


class Checkpoint:
    """An update's changes lie in one file, which goes when no parameter is in it any more."""

    def __init__(self, model: Path, scratch: Path, dtype: torch.dtype, *, tied: bool) -> None:
        """
        Args:
            model: folder with the safetensors of the start; they are mapped, not read.
            scratch: folder for the files of updates.
            dtype: what updates are written in, the engine's.
            tied: whether `lm_head.weight` is another name of the input embedding.
        """
        tensors: dict[str, Tensor] = {}
        start: dict[str, str] = {}
        for path in sorted(model.glob("*.safetensors")):
            part = load_file(path)
            tensors |= part
            start |= dict.fromkeys(part, str(path))
        aliases: dict[str, str] = {}
        embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
        if tied and embedding is not None:
            tensors.pop("lm_head.weight", None)
            start.pop("lm_head.weight", None)
            aliases = {"lm_head.weight": embedding}
        self._scratch = scratch
        self._aliases = aliases
        """The store's, too; modules that adapters name otherwise than the files come to them."""
        self._names = _FileNames(model, tensors)
        self._parameters = _Parameters(tuple(tensors))
        self._store = WeightStore(tensors, aliases, dtype)
        self._store.register(self._parameters)
        self._start = Plan(start, lambda: None)
        self._now = self._start

    @property
    def now(self) -> Plan:
        return self._now

    @property
    def start(self) -> Plan:
        return self._start

    def after(self, update: WeightsUpdate) -> Plan:
        """Checks an update, merges an adapter, and writes what changes.

        Raises:
            InvalidArgumentError: unknown names, wrong shapes, an adapter of a kind that cannot be merged.
            StorageError: no room.
        """
        place = self._store.prepare(self._by_file_names(update))
        changed, self._parameters.changed = self._parameters.changed, {}
        path = self._scratch / f"{update.version}.safetensors"
        _save(changed, path)
        return Plan({**self._now.paths, **dict.fromkeys(changed, str(path))}, place)

    def _by_file_names(self, update: WeightsUpdate) -> WeightsUpdate:
        if update.kind == "full":
            return replace(update, tensors=self._names.of(update.tensors, known=self._aliases))
        for module in adapted_modules(update.tensors):
            name = f"{module}.weight"
            alias, *more = self._names.of({name: torch.empty(2, 2)}, known=self._aliases)
            if more:
                raise InvalidArgumentError(
                    f"the files of the served model hold '{module}' in {1 + len(more)} parts, which no adapter can be "
                    "merged into; send full weights"
                )
            if alias != name:
                self._aliases[name] = alias
        return update

    def commit(self, plan: Plan) -> None:
        """The engine uses the weights of the plan."""
        plan.commit()
        self._now = plan
        self.discard()

    def discard(self) -> None:
        """Removes files that nothing needs, such as those of an update that failed."""
        needed = set(self._now.paths.values())
        for path in self._scratch.glob("*.safetensors"):
            if str(path) not in needed:
                path.unlink()


class _FileNames:
    """From the names of the loaded model, by which training sends weights, to those of the files, which vLLM reads:
    experts one by one, another prefix. What is in the files by the name that it has stays as it is.
    """

    def __init__(self, folder: Path, there: Collection[str]) -> None:
        self._folder, self._there = folder, there

    @cached_property
    def _model(self) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(self._folder)
        with torch.device("meta"):
            model: PreTrainedModel = language_model_class(config).from_config(config)
        return model

    def of(self, given: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
        """Names that fit nothing stay, and are refused by whoever looks for them."""
        found = {name: tensor for name, tensor in given.items() if name in self._there or name in known}
        other = {name: tensor for name, tensor in given.items() if name not in found}
        if other:
            saved = revert_weight_conversion(self._model, other)
            prefix = f"{self._model.base_model_prefix}."
            for name, tensor in saved.items():
                spellings = (name, name.removeprefix(prefix), prefix + name)
                found[next((one for one in spellings if one in self._there), name)] = tensor
        return found


class _Parameters:
    """Collects what an update changes; see `services.policy.engines.weights.Holder`."""

    transposed = False

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.changed: dict[str, Tensor] = {}

    def prepare(self, sources: Sequence[Source | None], dtype: torch.dtype) -> Place:
        for name, source in zip(self.names, sources, strict=True):
            if source is not None:
                self.changed[name] = source.tensor(dtype)
        return lambda: None


def save_adapter(folder: Path, update: WeightsUpdate) -> None:
    """Writes an adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
    if update.adapter_config is None:
        raise InvalidArgumentError("the LoRA update has no adapter_config, send PEFT's adapter_config.json")
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(dict(update.adapter_config)), encoding="utf-8")
    tensors = {name.replace(".default", ""): tensor.contiguous() for name, tensor in update.tensors.items()}
    _save(tensors, folder / "adapter_model.safetensors")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise StorageError(f"weights cannot be written to {path.parent} ({why(error)}); free space there") from None
