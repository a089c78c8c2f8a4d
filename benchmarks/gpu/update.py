"""The trainer's update on random models: forward, policy loss, backward; and the optimizer's step.

Work: groups of 4 answers of natural lengths (median 128, at most 512 tokens) to a prompt of 256 tokens, 1B in
micro-batches as the trainer cuts them where `microBatchTokens` is left open, 8B in those of 8,192 tokens.
`gemm_share`: the products that the mathematics needs (`benchmarks.train`) over the time, against the measured rate of a
large bf16 product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.gpu.setup import Setup, ceilings, median
from benchmarks.train import useful_gflop
from steersman.config.manifest import Lora
from steersman.nn.packed import PackedBatch, pack
from training.mathematics import losses
from training.online.budget import micro_batch_tokens
from training.online.policy_model import PolicyModel

TARGET = 0.45
PROMPT, ANSWERS, LONGEST = 256, 4, 512
MICRO_TOKENS = 8192


def run_1b(setup: Setup) -> dict[str, Any]:
    limit = ceilings(setup)["gemm_bf16_tflops"]
    found = {"1B, all weights": _measure(setup, "1B", None, limit)}
    setup.free()
    return found | {"1B, LoRA": _measure(setup, "1B", Lora(), limit)}


def run_8b(setup: Setup) -> dict[str, Any]:
    limit = ceilings(setup)["gemm_bf16_tflops"]
    return {"8B, LoRA": _measure(setup, "8B", Lora(), limit)}


def _batches(setup: Setup, vocab: int, micro_tokens: int) -> list[PackedBatch]:
    generator = np.random.default_rng(0)
    prompt, longest, budget = (16, 12, 64) if setup.quick else (PROMPT, LONGEST, micro_tokens)
    lengths = iter(common.natural_lengths(10_000, longest))

    def tokens(count: int) -> np.ndarray:
        return generator.integers(3, vocab, count).astype(np.int32)

    batches = []
    for _ in range(1 if micro_tokens > MICRO_TOKENS else 2):
        groups: list[tuple[np.ndarray, list[np.ndarray]]] = []
        size = 0
        while size < budget:
            groups.append((tokens(prompt), [tokens(next(lengths)) for _ in range(ANSWERS)]))
            size += prompt + sum(map(len, groups[-1][1]))
        batches.append(pack(groups, setup.device))
    return batches


def _measure(setup: Setup, shape: str, lora: Lora | None, limit: float) -> dict[str, Any]:
    setup.start_peak()
    model = PolicyModel(
        setup.model(shape, torch.float32), lora, None, None,
        device=setup.device, precision=setup.precision, temperature=1.0, seed=0,
    )  # fmt: skip
    model.train()
    module = model.policy.get_base_model() if lora else model.policy
    micro_tokens = micro_batch_tokens(model) if shape == "1B" else MICRO_TOKENS
    batches = _batches(setup, module.config.vocab_size, micro_tokens)
    parameters = model.policy_parameters()
    adam = torch.optim.AdamW(parameters, lr=1e-6, eps=1e-5, fused=True)
    advantages = [torch.randn(len(one.targets), device=setup.device) for one in batches]

    def passes() -> None:
        for batch, advantage in zip(batches, advantages, strict=True):
            forward = model(batch)
            loss, _ = losses.ppo_policy_loss(
                forward.logprobs, forward.logprobs.detach(), advantage, denominator=len(advantage), clip_low=0.2
            )
            loss.backward()

    def step() -> None:
        adam.step()
        adam.zero_grad(set_to_none=True)

    both = []
    for _ in range(2 + (1 if setup.quick else 5)):
        (seconds,) = setup.seconds(passes, 1, warmup=0)
        both.append((seconds, setup.seconds(step, 1, warmup=0)[0]))
    seconds, optimizer = (median(list(times)) for times in zip(*both[2:], strict=True))
    tokens, answers = sum(len(one.token_ids) for one in batches), sum(len(one.targets) for one in batches)
    rate = useful_gflop(module, tokens, answers, lora is not None) / seconds / 1e3
    finite = all(bool(parameter.isfinite().all()) for parameter in parameters)
    found: dict[str, Any] = {
        "micro_batch_tokens": micro_tokens,
        "tokens": tokens,
        "answer_tokens": answers,
        "seconds": seconds,
        "optimizer_seconds": optimizer,
        "tokens_per_second": tokens / seconds,
        "tflops": rate,
        "gemm_share": rate / limit,
        "target_share": TARGET,
        "peak_gib": setup.peak_gib(),
        "finite": finite,
    }
    setup.say(f"{shape}: {found['tokens_per_second']:.0f} tokens/s, {found['gemm_share']:.2f} of the products' rate")
    found["kernels"] = setup.kernels(passes)
    return found


def rows(report: dict[str, Any]) -> Sequence[Sequence[object]]:
    return [
        (f"update {name}", f"{one['tokens_per_second']:.0f} tokens/s, {one['peak_gib']:.1f} GiB",
         f"target {one['target_share']:.2f} of GEMM", f"{one['gemm_share']:.2f}")
        for name, one in report.items()
    ]  # fmt: skip
