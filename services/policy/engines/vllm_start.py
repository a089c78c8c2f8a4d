"""What vLLM is started with: its environment, and the arguments of its engine."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from services.policy.engines.hardware import Precision
from services.policy.engines.vllm_settings import VllmSettings

_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
_RUNNING_ADAPTERS = 2
"""The one in use, and the one that running samples began with."""


def engine_arguments(
    model: Path,
    config: PreTrainedConfig,
    options: VllmSettings,
    *,
    cpu: bool,
    precision: Precision,
    context: int,
    kv_cache_tokens: int,
    small: bool,
) -> Any:
    """vLLM's `AsyncEngineArgs`.

    Args:
        config: of the text model.
        options: with a decision about `lora`.
        context: longest prompt plus response in tokens.
        small: the folder has no tokenizer.
    """
    from vllm.config import StructuredOutputsConfig, WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    block = 32 if cpu else 16
    return AsyncEngineArgs(
        model=str(model),
        skip_tokenizer_init=small,
        dtype=_DTYPES[precision],  # type: ignore[arg-type]
        generation_config="vllm",
        max_model_len=context,
        max_num_seqs=options.max_running,
        block_size=block,
        num_gpu_blocks_override=-(-kv_cache_tokens // block) * cache_groups(config) + 1,
        gpu_memory_utilization=options.memory_share,
        # The number of blocks decides; but without any size the CPU build takes a share of the machine.
        kv_cache_memory_bytes=1 << 20 if cpu else None,
        enable_prefix_caching=not (cpu and has_states(config)),  # of states it wants prompts in parts, see below
        # After each part of a prompt but the last, vLLM rewinds the generator of the seed, which a CPU's cannot.
        enable_chunked_prefill=False if cpu else None,
        tensor_parallel_size=options.tensor_parallel,
        enforce_eager=options.eager,
        enable_lora=options.lora == "adapter",
        max_lora_rank=options.max_lora_rank,
        max_loras=_RUNNING_ADAPTERS,
        logprobs_mode="processed_logprobs",
        # The library and the form of JSON that the transformers engine has.
        structured_outputs_config=StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True),
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend="safetensors_files"),
        worker_extension_cls="services.policy.engines.vllm_transfer.WorkerExtension",
    )


def cache_groups(config: PreTrainedConfig) -> int:
    """Blocks that vLLM takes for the same tokens: layers of several kinds (windows, states) have tables of their own,
    in groups as large as the rarest kind, and a block holds one group.
    """
    kinds = Counter(getattr(config, "layer_types", None) or [""])
    size = min(kinds.values())
    return sum(-(-layers // size) for layers in kinds.values())


def has_states(config: PreTrainedConfig) -> bool:
    """Whether a layer keeps a state (recurrence, convolution) rather than keys and values."""
    kinds = getattr(config, "layer_types", None) or ()
    states = ("state_size", "mamba_d_state", "ssm_state_size", "conv_L_cache", "linear_conv_kernel_dim", "lru_width")
    return any("attention" not in kind or kind == "linear_attention" for kind in kinds) or any(
        getattr(config, name, None) for name in states
    )


def set_environment(threads: int) -> None:
    """vLLM takes these only from the environment; what is set there already stays."""
    cores = sorted(os.sched_getaffinity(0))
    for name, value in (
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),  # a fork would copy gRPC's threads in any state
        ("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores[: threads or len(cores)]))),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_LOGGING_LEVEL", "WARNING"),
    ):
        os.environ.setdefault(name, value)


def generation_config(folder: Path) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None
