"""Worker side of the vLLM engine: a backend of vLLM's weight transfer that reads safetensors files.

vLLM imports this module in every worker process, because the engine names `WorkerExtension`; that registers the
backend. An update names all parameters of the model, and the file that holds each: vLLM lays fused layers out anew,
so a layer is complete or not touched at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

BACKEND = "safetensors_files"


@dataclass
class FilesInitInfo(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class FilesUpdateInfo(WeightTransferUpdateInfo):
    files: dict[str, list[str]]
    """Names of the parameters, as in the checkpoint, by the path of their file."""


class FilesTransferEngine(WeightTransferEngine[FilesInitInfo, FilesUpdateInfo]):
    """See `vllm.distributed.weight_transfer.base.WeightTransferEngine`."""

    init_info_cls = FilesInitInfo
    update_info_cls = FilesUpdateInfo

    def init_transfer_engine(self, init_info: FilesInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        if current_platform.is_cpu():
            _forget_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FilesUpdateInfo) -> None:
        self.model.load_weights(_read(update_info.files))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            _pack_tied_head(self.model)

    def shutdown(self) -> None:
        pass


def _read(files: Mapping[str, Sequence[str]]) -> Iterable[tuple[str, torch.Tensor]]:
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)


def _pack_tied_head(model: torch.nn.Module) -> None:
    """The CPU's linear layers keep a packed copy of their weight; that of a tied head is of the old weights."""
    head: Any = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    if weight is not None and any(
        one is not head and getattr(one, "weight", None) is weight for one in model.modules()
    ):
        head.quant_method.process_weights_after_loading(head)


def _forget_experts(model: torch.nn.Module) -> None:
    """The CPU's experts pack their weights when their kernel is made, and not again for new weights."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class WorkerExtension:
    """Adds nothing to vLLM's worker but the import of this module."""


WeightTransferEngineFactory.register_engine(BACKEND, FilesTransferEngine)
