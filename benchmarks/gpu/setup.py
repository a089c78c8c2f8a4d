"""What the parts of the GPU check share: device, sizes, random models, clocks, ceilings."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from steersman.testing.models import tiny_tokenizer

_LLAMA = {"max_position_embeddings": 8192, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
}  # fmt: skip
"""SmolLM2-135M, Qwen3-0.6B (as a Llama), Llama 3.2 1B, Llama 3.1 8B."""


@dataclass(frozen=True)
class Setup:
    device: str
    quick: bool
    """Tiny sizes: whether everything runs, not how fast."""
    bundle: Path
    """Folder of `benchmarks.gpu.bundle`; where it holds no tokenizer, a tokenizer of bytes takes its place."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of generation: what a service takes by itself on a GPU."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def precision(self) -> str:
        return "bf16" if self.cuda else "fp32"

    def model(self, shape: str, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
        """A random model, made on the device."""
        config = LlamaConfig(**_LLAMA, **SHAPES["tiny" if self.quick else shape], bos_token_id=1, eos_token_id=2)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or self.dtype)
        try:
            with torch.device(self.device):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(self.device)  # never in bf16
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2], pad_token_id=0)
        return model.eval()

    def folder(self, shape: str, target: Path) -> Path:
        """The same as a folder with a tokenizer, in the checkpoint's usual bfloat16."""
        model = self.model(shape, torch.bfloat16)
        source = self.bundle / "tokenizer"
        whole = (source / "tokenizer.json").is_file() and not self.quick
        tokenizer = AutoTokenizer.from_pretrained(source) if whole else tiny_tokenizer()
        model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id])
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        return target

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], rounds: int, warmup: int = 1) -> list[float]:
        """Of each round, the device's work included."""
        times = []
        for number in range(-warmup, rounds):
            self.wait()
            start = time.perf_counter()
            action()
            self.wait()
            if number >= 0:
                times.append(time.perf_counter() - start)
        return times

    def say(self, text: str) -> None:
        """A line of the part's log, so that a part that is not done in time has told something."""
        print(text, flush=True)

    def free(self) -> None:
        """Gives the device's memory back that nothing refers to any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def start_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Most memory of the device since `start_peak`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def kernels(self, action: Callable[[], object]) -> dict[str, float]:
        """Milliseconds by kernel, the longest ones; `busy`: of all, `wall`: on the clock. Empty on a CPU."""
        if not self.cuda:
            return {}
        from torch.profiler import ProfilerActivity, profile

        self.wait()
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            action()
            self.wait()
            wall = 1e3 * (time.perf_counter() - start)
        events = [(one.key[:90], one.self_device_time_total / 1e3) for one in found.key_averages()]
        events = sorted((one for one in events if one[1]), key=lambda one: -one[1])
        return {"wall": wall, "busy": sum(one for _, one in events), **dict(events[:14])}


def median(times: list[float]) -> float:
    return statistics.median(times)


@torch.no_grad()
def ceilings(setup: Setup) -> dict[str, float]:
    """bf16 matrix products of 8192 rows on random data in TFLOP/s, a copy in GB/s read and written."""
    size = 256 if setup.quick else 8192
    a, b = (torch.randn(size, size, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = median(setup.seconds(functools.partial(_repeat, lambda: torch.mm(a, b, out=out)), 5))
    source = torch.randn((1 << 20) if setup.quick else (1 << 30), device=setup.device)
    target = torch.empty_like(source)
    copy = median(setup.seconds(functools.partial(_repeat, lambda: target.copy_(source)), 5))
    return {
        "gemm_bf16_tflops": 10 * 2 * size**3 / product / 1e12,
        "memory_copy_gb_s": 10 * 2 * source.nbytes / copy / 1e9,
    }


def _repeat(action: Callable[[], object]) -> None:
    for _ in range(10):
        action()
