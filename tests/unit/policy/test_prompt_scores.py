"""Log-probabilities of a prompt's own tokens: those of the model's forward pass, whatever else the request asks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from engine_client import collect, random_prompts
from transformers import PreTrainedModel

from services.policy.chat import ChatFormat, answer
from services.policy.engines import transformers_engine
from services.policy.engines.decoder import DecoderName
from services.policy.engines.transformers_engine import TransformersEngine
from steersman.errors import InvalidArgumentError, UnsupportedError
from steersman.generation import GenerationRequest, PromptScored, SamplingParams
from steersman.nn.tokens import tokenizer_fingerprint
from steersman.testing.models import tiny_llama, tiny_t5, tiny_tokenizer
from steersman.v1 import common_pb2
from steersman.v1 import policy_pb2 as pb


def scored(engine: TransformersEngine, prompts: list[np.ndarray], n: int = 1, **params: float) -> list[PromptScored]:
    """By prompt; each comes before the first token of its prompt."""
    asked = SamplingParams(max_new_tokens=2, top_logprobs=3, **params)  # type: ignore[arg-type]
    events, _ = collect(engine, GenerationRequest("t", prompts, asked, n=n, stream=True, score_prompts=True))
    found: dict[int, PromptScored] = {}
    for event in events:
        if isinstance(event, PromptScored):
            assert event.prompt_index not in found
            found[event.prompt_index] = event
        else:
            assert event.prompt_index in found  # type: ignore[union-attr]
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def reference(model: PreTrainedModel, prompt: np.ndarray) -> torch.Tensor:
    """[P - 1, V]"""
    ids = torch.from_numpy(prompt).long()
    return model(ids[None]).logits[0, :-1].float().log_softmax(-1)


@pytest.fixture(scope="module", params=["llama", "generic", "cached", "uncached"])
def engine(request: pytest.FixtureRequest) -> Iterator[TransformersEngine]:
    decoder: DecoderName = request.param
    engine = TransformersEngine(tiny_llama(), precision="fp32", device="cpu", decoder=decoder)
    engine.start()
    yield engine
    engine.close()


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"temperature": 2.0, "presence_penalty": 2.0}])
def test_a_prompt_has_the_models_own_log_probabilities(
    engine: TransformersEngine, params: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_engine, "_SCORED_AT_ONCE", 7 * 260)  # in parts
    model = tiny_llama()
    prompts = random_prompts([30, 1, 17])
    prompts.append(prompts[0].copy())  # what is in the cache already is computed all the same
    for prompt, found in zip(prompts, scored(engine, prompts, **params), strict=True):
        wanted = reference(model, prompt)
        chosen = wanted.gather(1, torch.from_numpy(prompt[1:]).long()[:, None])[:, 0]
        assert found.logprobs == pytest.approx(chosen.numpy(), abs=1e-4)
        top = wanted.topk(3)
        assert found.top_logprobs.shape == (len(prompt) - 1, 3)
        assert found.top_logprobs.ravel() == pytest.approx(top.values.numpy().ravel(), abs=1e-4)
        assert (found.top_ids != top.indices.numpy()).sum() <= 0.1 * found.top_ids.size  # but for near ties


def test_scoring_changes_no_sample(engine: TransformersEngine) -> None:
    prompts = random_prompts([20, 24])
    prompts[1][:20] = prompts[0]
    params = SamplingParams(max_new_tokens=8, seed=5)
    plain = collect(engine, GenerationRequest("t", prompts, params, n=2))[1]
    asked = GenerationRequest("t", prompts, params, n=2, stream=True, score_prompts=True)
    events, found = collect(engine, asked)
    assert sum(isinstance(event, PromptScored) for event in events) == 2
    for key, sample in plain.items():
        assert found[key].token_ids.tolist() == sample.token_ids.tolist()


def test_who_cannot_tell_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    request = GenerationRequest("t", random_prompts([9]), SamplingParams(max_new_tokens=1), score_prompts=True)
    engine = TransformersEngine(tiny_t5(), precision="fp32", device="cpu")
    engine.start()
    try:
        with pytest.raises(UnsupportedError, match="encoder-decoder"):
            engine.submit(request, lambda event: None)
    finally:
        engine.close()
    monkeypatch.setattr(transformers_engine, "_SCORED_AT_ONCE_PLAIN", 8 * 260)
    engine = TransformersEngine(tiny_llama(), precision="fp32", device="cpu", decoder="cached")
    engine.start()
    try:
        with pytest.raises(InvalidArgumentError, match=r"9 tokens; .* of 8 at most"):
            engine.submit(request, lambda event: None)
    finally:
        engine.close()


async def test_the_service_tells_them_before_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama()
    engine = TransformersEngine(tiny_llama(), precision="fp32", device="cpu")
    engine.start()
    try:
        chat = ChatFormat(tokenizer, tokenizer_fingerprint(tokenizer))
        sampling = common_pb2.SamplingParams(max_new_tokens=3, temperature=0.0)
        text = "Grüße " * 60
        request = pb.PolicyServiceChatRequest(
            prompt=text, sampling=sampling, top_logprobs=2, prompt_logprobs=True, whole=True
        )
        responses = [response async for response in answer(engine, chat, request)]
        counts = [len(response.prompt_logprobs) for response in responses]
        assert (counts[0], counts[-1], responses[-1].completion_tokens > 0) == (256, 0, True)
        tokens = [token for response in responses for token in response.prompt_logprobs]
        assert b"".join(token.raw for token in tokens).decode().endswith(text)
        ids = np.array([token.token_id for token in tokens], np.int32)
        wanted = reference(model, ids).gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0].numpy()
        assert [token.logprob for token in tokens[1:]] == pytest.approx(wanted, abs=1e-4)
        assert (tokens[0].logprob, len(tokens[0].top), len(tokens[1].top)) == (0.0, 0, 2)
        message = common_pb2.Message(role="user", content="x")
        request = pb.PolicyServiceChatRequest(messages=[message], sampling=sampling, prompt_logprobs=True)
        with pytest.raises(InvalidArgumentError, match="prompt_logprobs"):
            await anext(answer(engine, chat, request))
    finally:
        engine.close()
