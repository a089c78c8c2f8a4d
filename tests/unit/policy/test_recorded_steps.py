"""What goes on beside the recorded decode steps of a GPU: heads of ILQL, remembered conversations, new weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_client import CUDA, collect, random_prompts, reference_logprobs, samples
from numeric import assert_same

from services.policy.engine import GenerationRequest, SampleFinished, SamplingParams, WeightsUpdate
from services.policy.engines.transformers_engine import TransformersEngine
from steersman.nn.ilql import AdvantageHeads
from steersman.testing.models import tiny_llama


@torch.no_grad()
def test_heads_of_ilql_shift_what_is_drawn(device: str) -> None:
    """With samples of many lengths in one batch, where rows and tokens of a recorded step are rounded up."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(4)
    heads = AdvantageHeads(model.config.hidden_size, model.config.vocab_size, beta=2.0)
    for parameter in heads.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    engine = TransformersEngine(tiny_llama(), precision="fp32", device=device, max_rows=12)
    engine.start()
    try:
        prompts = random_prompts(range(3, 30))
        plain = samples(engine, prompts, SamplingParams(max_new_tokens=40, seed=1))
        engine.load_weights(WeightsUpdate(1, "full", dict(model.state_dict()) | dict(heads.tensors(heads.q))))
        found = samples(engine, prompts, SamplingParams(max_new_tokens=40, seed=1))
        assert bool(engine._graphs._graphs) == (device == "cuda")
        engine.load_weights(WeightsUpdate(2, "full", dict(model.state_dict())))
        again = samples(engine, prompts, SamplingParams(max_new_tokens=40, seed=1))
    finally:
        engine.close()
    for index, prompt in enumerate(prompts):
        one = found[index, 0]
        ids = torch.from_numpy(np.concatenate([prompt, one.token_ids])).long()
        output = model(ids[None], output_hidden_states=True)
        shifted = (output.logits + heads(output.hidden_states[-1]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = shifted.gather(1, ids[len(prompt) :, None])[:, 0]
        assert_same(one.logprobs, wanted.numpy())
        assert_same(plain[index, 0].logprobs, reference_logprobs(model, prompt, plain[index, 0].token_ids))
        assert again[index, 0].token_ids.tolist() == plain[index, 0].token_ids.tolist()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_remembered_conversation_goes_on_in_recorded_steps(device: str, recorded: bool) -> None:
    """Rollouts in between take rows and make the cache larger; drafts, asked for, change nothing where they are off."""
    engine = TransformersEngine(tiny_llama(), precision="fp32", device=device, max_rows=8, lookahead=True)
    engine.start()
    engine._graphs.enabled = engine._graphs.enabled and recorded
    try:
        prompt = random_prompts([50])[0]
        for turn in range(5):
            model = tiny_llama(seed=turn // 3)
            if turn == 3:
                engine.load_weights(WeightsUpdate(1, "full", dict(model.state_dict())))
                assert engine.info().details["prefix_tokens_used"] == 0
            chat = GenerationRequest("chat", [prompt], SamplingParams(max_new_tokens=12, seed=turn), stream=True)
            answer: SampleFinished = collect(engine, chat)[1][0, 0]
            assert_same(answer.logprobs, reference_logprobs(model, prompt, answer.token_ids))
            assert engine.info().details["prefix_tokens_used"] == len(prompt) + len(answer.token_ids) - 1
            others = random_prompts(range(5, 25), seed=turn)
            rollouts = samples(engine, others, SamplingParams(max_new_tokens=30 + 20 * turn, seed=turn))
            for index, other in enumerate(others):
                assert_same(rollouts[index, 0].logprobs, reference_logprobs(model, other, rollouts[index, 0].token_ids))
            prompt = np.concatenate([prompt, answer.token_ids, *random_prompts([7], seed=turn)]).astype(np.int32)
        assert bool(engine._graphs._graphs) == recorded
    finally:
        engine.close()
