"""Generation: tokens per second of the transformers engine and of `model.generate`, on the same random 1B model.

Prompts of 60 tokens, nothing ends early. The peer is a static batch that runs until its longest answer is done, with
log-probabilities kept, as a rollout needs them. `mismatch`: sampled tokens' log-probabilities against the float32
forward of transformers.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, PreTrainedModel

from benchmarks.gpu.setup import Setup, median
from benchmarks.rollout import Logprobs, Workload
from services.policy.engines.transformers_engine import TransformersEngine
from steersman.generation import Event, GenerationRequest, RequestFailed, SampleFinished, SamplingParams

PROMPT_TOKENS = 60


def run(setup: Setup) -> dict[str, Any]:
    model = setup.model("1B")
    works = _workloads(setup, model.config.vocab_size)
    exact = copy.deepcopy(model).float()
    _generate(model, Workload("warm-up", works[0].prompts, [4]), setup)
    peer: dict[str, float] = {}
    for work in works:
        (peer[work.name],) = setup.seconds(lambda work=work: _generate(model, work, setup), 1, 0)
        setup.say(f"generate, {work.name}: {work.tokens / peer[work.name]:.0f} tokens/s")
    engine = TransformersEngine(
        model,
        device=setup.device,
        precision="bf16" if setup.cuda else "fp32",
        max_rows=256,
        kv_cache_tokens=256 * 1024,
    )
    engine.start()
    report: dict[str, Any] = {"workloads": {}}
    try:
        for work in works:
            report["workloads"][work.name] = found = _measured(engine, work, peer[work.name], setup)
            setup.say(f"engine, {work.name}: {found['tokens_per_second']:.0f} tokens/s")
        engine._graphs.enabled = False  # what recording the steps brings
        (alone,) = setup.seconds(lambda: rollout(engine, works[1]), 1)
        engine._graphs.enabled = setup.cuda
        report["tokens_per_second_without_graphs"] = works[1].tokens / alone
        report["mismatch"] = _mismatch(exact, works[1], rollout(engine, works[1]), setup)
        few = Workload("16 steps", works[1].prompts, [16] * len(works[1].prompts))
        rollout(engine, few)
        report["kernels of 16 steps"] = setup.kernels(lambda: rollout(engine, few))
    finally:
        engine.close()
    return report


def _measured(engine: TransformersEngine, work: Workload, peer: float, setup: Setup) -> dict[str, Any]:
    (first,) = setup.seconds(lambda: rollout(engine, work), 1, 0)  # with its graphs to record
    times = setup.seconds(lambda: rollout(engine, work), 3, 0)
    return {
        "tokens": work.tokens,
        "seconds": times,
        "first_seconds": first,
        "tokens_per_second": work.tokens / median(times),
        "generate_tokens_per_second": work.tokens / peer,
        "ratio": peer / median(times),
    }


def _workloads(setup: Setup, vocab: int) -> list[Workload]:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, vocab, PROMPT_TOKENS).astype(np.int32) for _ in range(256)]
    short, rows = (6, 4) if setup.quick else (64, 64)
    varied = generator.integers(short // 4, 3 * short, rows).tolist()
    works = [
        Workload("1 request", prompts[:1], [short]),
        Workload(f"{rows} equal", prompts[:rows], [short] * rows),
        Workload(f"{rows} varied", prompts[:rows], varied),
    ]
    return works if setup.quick else [*works, Workload("256 equal", prompts, [short] * 256)]


@torch.inference_mode()
def _generate(model: PreTrainedModel, work: Workload, setup: Setup) -> None:
    ids = torch.from_numpy(np.stack(work.prompts)).long().to(setup.device)
    longest = max(work.lengths)
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=longest,
        min_new_tokens=longest,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        logits_processor=LogitsProcessorList([Logprobs()]),
    )


def rollout(engine: TransformersEngine, work: Workload) -> dict[int, SampleFinished]:
    """Every sample by the number of its prompt; a request for each, because lengths differ."""
    arrived: queue.Queue[tuple[int, Event]] = queue.Queue()
    for index in np.argsort(work.lengths, kind="stable")[::-1].tolist():
        length = work.lengths[index]
        params = SamplingParams(max_new_tokens=length, min_new_tokens=length, seed=index)
        request = GenerationRequest(str(index), [work.prompts[index]], params)
        engine.submit(request, lambda event, index=index: arrived.put((index, event)))
    found: dict[int, SampleFinished] = {}
    while len(found) < len(work.prompts):
        index, event = arrived.get(timeout=300)
        if isinstance(event, RequestFailed):
            raise event.error
        if isinstance(event, SampleFinished):
            found[index] = event
    return found


@torch.inference_mode()
def _mismatch(exact: PreTrainedModel, work: Workload, found: dict[int, SampleFinished], setup: Setup) -> float:
    differences: list[np.ndarray] = []
    for index in sorted(found)[:16]:
        prompt, answer = work.prompts[index], found[index]
        ids = torch.from_numpy(np.concatenate([prompt, answer.token_ids])).long().to(setup.device)
        logits = exact(ids[None]).logits[0, len(prompt) - 1 : -1].float()
        wanted = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
        differences.append(np.abs(wanted.cpu().numpy() - answer.logprobs))
    return float(np.concatenate(differences).mean())


def rows(report: dict[str, Any]) -> Sequence[Sequence[object]]:
    """(what, measured, of the peer or target, ratio)"""
    return [
        (f"rollout 1B, {name}", f"{one['tokens_per_second']:.0f} tokens/s",
         f"generate {one['generate_tokens_per_second']:.0f}", f"{one['ratio']:.2f}")
        for name, one in report["workloads"].items()
    ]  # fmt: skip
