"""What a chat gets beyond a rollout: its earlier turns are remembered, and its answer is drafted from its own words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from engine_client import collect, random_prompts, reference_logprobs
from numeric import assert_same
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from services.policy.engine import GenerationRequest, SampleFinished, SamplingParams, WeightsUpdate
from services.policy.engines.decoder import GenericDecoder, LlamaDecoder
from services.policy.engines.lookahead import Lookahead
from services.policy.engines.transformers_engine import TransformersEngine
from steersman.testing.models import tiny_llama, tiny_qwen2


def tiny_gemma2() -> PreTrainedModel:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=12,
            query_pre_attn_scalar=16,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def engine_of() -> Iterator[Callable[..., TransformersEngine]]:
    engines: list[TransformersEngine] = []

    def build(model: PreTrainedModel, **settings: object) -> TransformersEngine:
        engines.append(TransformersEngine(model, precision="fp32", device="cpu", **settings))  # type: ignore[arg-type]
        engines[-1].start()
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompt tokens of each prefill."""
    return counted(monkeypatch, "prefill")


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    tokens: list[int] = []
    for decoder in (LlamaDecoder, GenericDecoder):
        original = getattr(decoder, name)

        def counting(self, token_ids, positions, step, _original=original):
            tokens.append(len(token_ids))
            return _original(self, token_ids, positions, step)

        monkeypatch.setattr(decoder, name, counting)
    return tokens


def chat(engine: TransformersEngine, prompt: np.ndarray, **params: object) -> SampleFinished:
    request = GenerationRequest("chat", [prompt], SamplingParams(**{"max_new_tokens": 12} | params), stream=True)  # type: ignore[arg-type]
    return collect(engine, request)[1][0, 0]


def next_turn(prompt: np.ndarray, answer: SampleFinished, seed: int = 9) -> np.ndarray:
    return np.concatenate([prompt, answer.token_ids, *random_prompts([7], seed=seed)]).astype(np.int32)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gemma2])
def test_a_next_turn_computes_only_what_is_new(build, engine_of, prefilled) -> None:
    engine, prompt = engine_of(build()), random_prompts([50])[0]
    for seed in range(4):
        prefilled.clear()
        answer = chat(engine, prompt, seed=seed)
        assert_same(answer.logprobs, reference_logprobs(build(), prompt, answer.token_ids))
        # The answer's last token was never fed, and the prompt's last is a decode step.
        assert sum(prefilled) == (49 if seed == 0 else 1 + 7 - 1)
        prompt = next_turn(prompt, answer, seed)
    assert engine.info().details["prefix_tokens_used"] == len(prompt) - 7 - 1, (
        "a turn takes the place of the one before"
    )


def test_new_weights_forget_what_is_remembered(engine_of, prefilled) -> None:
    engine, prompt = engine_of(tiny_llama()), random_prompts([50])[0]
    turn = next_turn(prompt, chat(engine, prompt))
    engine.load_weights(WeightsUpdate(1, "full", dict(tiny_llama(seed=1).state_dict())))
    assert engine.info().details["prefix_tokens_used"] == 0
    prefilled.clear()
    answer = chat(engine, turn)
    assert sum(prefilled) == len(turn) - 1
    assert_same(answer.logprobs, reference_logprobs(tiny_llama(seed=1), turn, answer.token_ids))


def test_rollouts_neither_leave_nor_find_anything(engine_of, prefilled) -> None:
    engine, prompt = engine_of(tiny_llama()), random_prompts([50])[0]
    rollout = GenerationRequest("rollout", [prompt], SamplingParams(max_new_tokens=8))
    first = collect(engine, rollout)[1][0, 0]
    assert engine.info().details["prefix_tokens_used"] == 0
    chat(engine, prompt)
    prefilled.clear()
    again = collect(engine, rollout)[1][0, 0]
    assert sum(prefilled) == 49
    np.testing.assert_array_equal(first.logprobs, again.logprobs)


def test_the_memory_is_bounded_and_keeps_what_was_used_last(engine_of, prefilled) -> None:
    engine, prompts = engine_of(tiny_llama(), prefix_tokens=130), random_prompts([50, 50, 50])
    turns = [next_turn(prompt, chat(engine, prompt)) for prompt in prompts[:2]]
    chat(engine, turns[0], max_new_tokens=1)  # now the first is the one used last
    chat(engine, prompts[2])
    assert engine.info().details["prefix_tokens_used"] <= 130
    prefilled.clear()
    chat(engine, turns[0], max_new_tokens=1)
    assert sum(prefilled) < 20
    prefilled.clear()
    chat(engine, turns[1], max_new_tokens=1)
    assert sum(prefilled) == len(turns[1]) - 1
    forgetful = engine_of(tiny_llama(), prefix_tokens=0)
    chat(forgetful, prompts[0])
    assert forgetful.info().details["prefix_tokens_used"] == 0


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gemma2])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.2, "top_p": 0.9, "seed": 5}, {"seed": 4}])
def test_drafts_change_no_sample(build, params, engine_of) -> None:
    prompt = np.tile(random_prompts([11])[0], 5)
    options = params | {"max_new_tokens": 90, "min_new_tokens": 40, "stop_token_ids": (7, 19), "top_logprobs": 2}
    plain = chat(engine_of(build()), prompt, **options)
    drafted = chat(engine_of(build(), lookahead=True), prompt, **options)
    np.testing.assert_array_equal(drafted.token_ids, plain.token_ids)
    assert_same(drafted.logprobs, plain.logprobs)
    assert drafted.finish_reason == plain.finish_reason


def test_an_answer_that_repeats_itself_takes_fewer_steps(engine_of, monkeypatch) -> None:
    prompt, options = random_prompts([11])[0], {"temperature": 0.0, "max_new_tokens": 120, "min_new_tokens": 120}
    plain = chat(engine_of(tiny_llama()), prompt, **options)
    assert len(set(plain.token_ids[-40:].tolist())) < 20, "the model of this test repeats itself"
    steps = counted(monkeypatch, "decode")
    drafted = chat(engine_of(tiny_llama(), lookahead=True), prompt, **options)
    assert len(steps) < 60
    np.testing.assert_array_equal(drafted.token_ids, plain.token_ids)


@pytest.mark.parametrize(
    "restricted",
    [{"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"max_new_tokens": 1}],
    ids=lambda restricted: next(iter(restricted)),
)
def test_what_depends_on_the_tokens_before_is_drawn_one_by_one(restricted, engine_of, monkeypatch) -> None:
    steps = counted(monkeypatch, "decode")
    chat(engine_of(tiny_llama(), lookahead=True), np.tile(random_prompts([11])[0], 5), temperature=0.0, **restricted)
    assert set(steps) == {1}


def test_a_draft_is_what_followed_the_last_words_and_is_given_up_where_it_is_wrong() -> None:
    ahead = Lookahead(np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]))
    assert ahead.draft([], 2) == [4, 5]
    assert ahead.draft([], 0) == []
    ahead.learn(2, 2)
    assert ahead.draft([4], 50) == [5, 6, 7, 8, 9, 1, 2, 3]
    ahead.learn(8, 0)
    assert [ahead.draft([4, 5], 50) for _ in range(3)] == [[], [], [6, 7, 8, 9]]
    assert ahead.draft([4, 5, 77], 50) == []


def test_a_draft_goes_round_with_what_goes_round() -> None:
    assert Lookahead(np.array([9, 9, 1, 2, 1, 2, 1, 2])).draft([], 4) == [1, 2, 1, 2]
