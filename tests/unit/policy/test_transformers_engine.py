"""The transformers engine against transformers itself, on tiny random models."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from engine_client import TIMEOUT, collect, gather, random_prompts, reference_logprobs, samples
from numeric import assert_same
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from services.policy.engine import Event, GenerationRequest, SampleFinished, SamplingParams, TokenEvent, WeightsUpdate
from services.policy.engines.decoder import GenericDecoder, LlamaDecoder
from services.policy.engines.transformers_engine import TransformersEngine
from steersman.errors import InvalidArgumentError, UnavailableError
from steersman.testing.models import tiny_llama, tiny_qwen2

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def _tiny(build: type[PreTrainedModel], config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build(config).eval()  # type: ignore[arg-type]
    model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=3)
    return model


def tiny_qwen3() -> PreTrainedModel:
    return _tiny(Qwen3ForCausalLM, Qwen3Config(**SIZES))


def tiny_mistral() -> PreTrainedModel:
    return _tiny(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=12))


def tiny_gemma2() -> PreTrainedModel:
    """Sliding windows on every other layer, soft-capped scores and logits, another residual order."""
    return _tiny(Gemma2ForCausalLM, Gemma2Config(**SIZES, sliding_window=12, query_pre_attn_scalar=16))


MODELS = [tiny_llama, tiny_qwen2, tiny_qwen3, tiny_mistral, tiny_gemma2]


@pytest.fixture
def engine_of(device: str) -> Iterator[Callable[..., TransformersEngine]]:
    engines: list[TransformersEngine] = []

    def build(model: PreTrainedModel, **settings: object) -> TransformersEngine:
        options = {"precision": "fp32", "device": device} | settings
        engines.append(TransformersEngine(model, **options))  # type: ignore[arg-type]
        engines[-1].start()
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("build", MODELS)
def test_logprobs_equal_the_transformers_forward(build, engine_of) -> None:
    reference, prompts = build(), random_prompts([5, 1, 40, 17, 2])
    found = samples(engine_of(build()), prompts, SamplingParams(max_new_tokens=24, seed=3), n=2)
    for (prompt_index, _), sample in found.items():
        expected = reference_logprobs(reference, prompts[prompt_index], sample.token_ids)
        assert_same(sample.logprobs, expected)
        assert sample.token_ids.dtype == np.int32
        assert sample.logprobs.dtype == np.float32


@torch.no_grad()
def test_penalties_count_the_tokens_of_the_response(engine_of) -> None:
    model, (prompt,) = tiny_llama(), random_prompts([6])
    bias = ((5, 0.5), (7, -100.0))
    params = SamplingParams(
        max_new_tokens=16, temperature=0.0, presence_penalty=0.4, frequency_penalty=0.3, logit_bias=bias
    )
    sample = samples(engine_of(tiny_llama()), [prompt], params)[0, 0]
    ids = prompt.tolist()
    for token, logprob in zip(sample.token_ids.tolist(), sample.logprobs, strict=True):
        logits = model(torch.tensor([ids])).logits[0, -1].float()
        for place, amount in bias:
            logits[place] += amount
        for seen in ids[len(prompt) :]:
            logits[seen] -= 0.3
        for seen in set(ids[len(prompt) :]):
            logits[seen] -= 0.4
        assert token == int(logits.argmax())
        assert logprob == pytest.approx(float(torch.log_softmax(logits, 0)[token]), abs=1e-4)
        ids.append(token)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("build", MODELS)
def test_bf16_logprobs_are_near_the_fp32_forward(build, n, engine_of) -> None:
    """Two rows and eight: a few have other kernels than many."""
    reference, prompts = build(), random_prompts([5, 40])
    found = samples(engine_of(build(), precision="bf16"), prompts, SamplingParams(max_new_tokens=24, seed=3), n=n)
    errors = [
        np.abs(sample.logprobs - reference_logprobs(reference, prompts[prompt_index], sample.token_ids))
        for (prompt_index, _), sample in found.items()
    ]
    assert np.concatenate(errors).mean() < 0.02


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_qwen3, tiny_mistral])
def test_the_generic_decoder_gives_the_same_as_the_fast_one(build, engine_of) -> None:
    prompts, params = random_prompts([5, 30, 8]), SamplingParams(max_new_tokens=20, seed=1)
    fast_engine = engine_of(build())
    assert isinstance(fast_engine._decoder, LlamaDecoder)
    fast = samples(fast_engine, prompts, params)
    generic_engine = engine_of(build(), decoder="generic")
    assert isinstance(generic_engine._decoder, GenericDecoder)
    generic = samples(generic_engine, prompts, params)
    for place, sample in fast.items():
        np.testing.assert_array_equal(sample.token_ids, generic[place].token_ids)
        assert_same(sample.logprobs, generic[place].logprobs)


@pytest.mark.parametrize("build", MODELS)
def test_greedy_equals_generate(build, engine_of) -> None:
    reference, prompts = build(), random_prompts([4, 21])
    found = samples(engine_of(build()), prompts, SamplingParams(max_new_tokens=16, temperature=0.0))
    for index, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt).long()[None]
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        np.testing.assert_array_equal(found[index, 0].token_ids, expected[0, len(prompt) :].numpy())


def test_a_sample_does_not_depend_on_its_neighbours(engine_of) -> None:
    """Few rows force waiting, row reuse, moving and early leaving; the samples stay those of a wide engine."""
    prompts = random_prompts([3, 50, 7, 11, 90, 2, 30, 30, 5])
    params = SamplingParams(max_new_tokens=30, seed=9, stop_token_ids=tuple(range(100, 130)))
    wide = samples(engine_of(tiny_llama(), max_rows=64), prompts, params, n=3)
    narrow = samples(engine_of(tiny_llama(), max_rows=4, kv_cache_tokens=640), prompts, params, n=3)
    assert len({len(sample.token_ids) for sample in wide.values()}) > 5
    for place, sample in wide.items():
        np.testing.assert_array_equal(sample.token_ids, narrow[place].token_ids)
        assert_same(sample.logprobs, narrow[place].logprobs)
        assert sample.finish_reason == narrow[place].finish_reason


def test_common_prefixes_are_computed_once(engine_of, monkeypatch) -> None:
    computed: list[int] = []
    original = LlamaDecoder.prefill

    def counting(self, token_ids, positions, step) -> None:
        computed.append(len(token_ids))
        original(self, token_ids, positions, step)

    monkeypatch.setattr(LlamaDecoder, "prefill", counting)
    system, ends = random_prompts([40])[0], random_prompts([10, 12, 40], seed=1)
    prompts = [np.concatenate([system, ends[0]]), np.concatenate([system, ends[1]]), system, ends[2]]
    found = samples(engine_of(tiny_llama()), prompts, SamplingParams(max_new_tokens=8, seed=2), n=4)
    assert sum(computed) == (50 - 1) + (12 - 1) + 0 + (40 - 1)
    for (prompt_index, _), sample in found.items():
        expected = reference_logprobs(tiny_llama(), prompts[prompt_index], sample.token_ids)
        assert_same(sample.logprobs, expected)
    assert len({tuple(found[0, index].token_ids) for index in range(4)}) == 4


def test_the_cache_budget_is_kept_and_a_long_request_gets_its_turn(engine_of) -> None:
    engine = engine_of(tiny_llama(), max_rows=16, kv_cache_tokens=512)
    most, original = [0], engine._cache.resize

    def watched(*args: int) -> None:
        original(*args)
        most[0] = max(most[0], engine._cache.rows * engine._cache.capacity)

    engine._cache.resize = watched  # type: ignore[method-assign]
    prompts = random_prompts([10] * 10 + [400] + [10] * 10)
    found = samples(engine, prompts, SamplingParams(max_new_tokens=20, seed=0))
    assert most[0] <= 512
    for (prompt_index, _), sample in found.items():
        expected = reference_logprobs(tiny_llama(), prompts[prompt_index], sample.token_ids)
        assert_same(sample.logprobs, expected)


def test_the_same_seed_gives_the_same_samples(engine_of) -> None:
    prompts, params = random_prompts([5, 9, 30]), SamplingParams(max_new_tokens=30, seed=5)
    engine = engine_of(tiny_llama())
    first, again = samples(engine, prompts, params, n=3), samples(engine, prompts, params, n=3)
    other = samples(engine, prompts, SamplingParams(max_new_tokens=30, seed=6), n=3)
    for place, sample in first.items():
        np.testing.assert_array_equal(sample.token_ids, again[place].token_ids)
        np.testing.assert_array_equal(sample.logprobs, again[place].logprobs)
        assert sample.token_ids.tolist() != other[place].token_ids.tolist()


def test_temperature_is_applied_to_the_logprobs(engine_of) -> None:
    prompts = random_prompts([6, 12])
    found = samples(engine_of(tiny_llama()), prompts, SamplingParams(max_new_tokens=20, temperature=0.5, top_k=5))
    for (prompt_index, _), sample in found.items():
        expected = reference_logprobs(tiny_llama(), prompts[prompt_index], sample.token_ids, temperature=0.5)
        assert_same(sample.logprobs, expected)


def test_stop_tokens_end_a_sample_but_not_before_the_minimum(engine_of) -> None:
    engine, prompts = engine_of(tiny_llama()), random_prompts([8] * 6)
    stops = tuple(range(20, 120))
    found = samples(engine, prompts, SamplingParams(max_new_tokens=40, stop_token_ids=stops))
    assert {sample.finish_reason for sample in found.values()} == {"stop"}
    for sample in found.values():
        assert sample.token_ids[-1] in (*stops, 2)
        assert not set(sample.token_ids[:-1]) & {*stops, 2}
    late = samples(engine, prompts, SamplingParams(max_new_tokens=40, stop_token_ids=stops, min_new_tokens=10))
    for (prompt_index, _), sample in late.items():
        assert len(sample.token_ids) > 10
        assert not set(sample.token_ids[:10]) & {*stops, 2}
        # Suppressed tokens keep their probability in the reported distribution.
        expected = reference_logprobs(tiny_llama(), prompts[prompt_index], sample.token_ids)
        assert_same(sample.logprobs, expected)


def test_the_context_ends_a_sample_and_a_longer_prompt_is_refused(engine_of) -> None:
    engine = engine_of(tiny_llama(), max_context=32)
    params = SamplingParams(max_new_tokens=100, min_new_tokens=100)
    sample = samples(engine, random_prompts([20]), params)[0, 0]
    assert (len(sample.token_ids), sample.finish_reason) == (12, "length")
    with pytest.raises(InvalidArgumentError, match=r"prompts\[1\] has 32 tokens, the model's context holds 32"):
        samples(engine, random_prompts([20, 32]), params)
    with pytest.raises(InvalidArgumentError, match=r"prompts\[0\] holds token id 260"):
        samples(engine, [np.array([5, 260], np.int32)], params)
    with pytest.raises(InvalidArgumentError, match="does not fit the key-value cache of 64 tokens"):
        samples(engine_of(tiny_llama(), kv_cache_tokens=64), random_prompts([60]), params)


def test_streamed_tokens_carry_their_alternatives(engine_of) -> None:
    params = SamplingParams(max_new_tokens=12, top_logprobs=3, seed=4)
    prompt = random_prompts([9])[0]
    events, found = collect(engine_of(tiny_llama()), GenerationRequest("s", [prompt], params, stream=True))
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [event.token_id for event in tokens] == found[0, 0].token_ids.tolist()
    ids = torch.from_numpy(np.concatenate([prompt, found[0, 0].token_ids])).long()
    expected = tiny_llama()(ids[None]).logits[0, len(prompt) - 1 :].log_softmax(-1).topk(3)
    for place, event in enumerate(tokens):
        assert [token for token, _ in event.top_logprobs] == expected.indices[place].tolist()
        assert_same([value for _, value in event.top_logprobs], expected.values[place].detach())


def test_a_constraint_restricts_the_tokens_and_its_error_stays_with_its_request(engine_of) -> None:
    engine, prompts = engine_of(tiny_llama()), random_prompts([6, 7])

    def only_even(prompt_index: int, sample_index: int, token_ids) -> np.ndarray:
        return np.arange(260) % 2 == (len(token_ids) % 2)

    params = SamplingParams(max_new_tokens=10, min_new_tokens=10)
    _, found = collect(engine, GenerationRequest("even", prompts, params, n=2, constraint=only_even))
    for (prompt_index, _), sample in found.items():
        assert (sample.token_ids % 2).tolist() == [0, 1] * 5
        expected = reference_logprobs(tiny_llama(), prompts[prompt_index], sample.token_ids)
        assert_same(sample.logprobs, expected)

    arrived: queue.Queue[Event] = queue.Queue()
    engine.submit(GenerationRequest("none", prompts, params, constraint=lambda *_: np.zeros(260, bool)), arrived.put)
    good = samples(engine, prompts, params)
    assert len(good) == 2
    failure = arrived.get(timeout=TIMEOUT)
    assert "allows no token" in str(failure.error)  # type: ignore[union-attr]
    assert arrived.empty()


class Throttle:
    """Slows the engine's callbacks until `release`, so that something can happen in the middle of a sample."""

    def __init__(self, after: int) -> None:
        self.arrived: queue.Queue[Event] = queue.Queue()
        self.reached = threading.Event()
        self.released = threading.Event()
        self._left = after

    def __call__(self, event: Event) -> None:
        self.arrived.put(event)
        self._left -= 1
        if self._left <= 0:
            self.reached.set()
            self.released.wait(0.05)


def test_weights_swapped_in_the_middle_are_used_and_recorded(engine_of) -> None:
    engine, prompt = engine_of(tiny_llama()), random_prompts([8])[0]
    request = GenerationRequest("swap", [prompt], SamplingParams(max_new_tokens=300, min_new_tokens=300), stream=True)
    throttle = Throttle(after=10)
    engine.submit(request, throttle)
    assert throttle.reached.wait(TIMEOUT)
    new = {name: tensor.clone() for name, tensor in tiny_llama(seed=1).state_dict().items()}
    engine.load_weights(WeightsUpdate(7, "full", new))
    throttle.released.set()
    events, found = gather(throttle.arrived, request)
    assert found[0, 0].weights_versions == (0, 7)
    assert engine.info().weights_version == 7
    versions = [event.weights_version for event in events if isinstance(event, TokenEvent)]
    swapped = versions.index(7)
    assert versions == [0] * swapped + [7] * (300 - swapped)
    expected = reference_logprobs(tiny_llama(), prompt, found[0, 0].token_ids[:swapped])
    assert_same(found[0, 0].logprobs[:swapped], expected)
    # A new sample uses nothing of the old weights, not even a prefix that a running one still holds.
    after = samples(engine, [prompt], SamplingParams(max_new_tokens=20))[0, 0]
    assert after.weights_versions == (7,)
    assert_same(after.logprobs, reference_logprobs(tiny_llama(seed=1), prompt, after.token_ids))


def test_a_prefix_of_old_weights_is_not_shared(engine_of) -> None:
    engine, prompt = engine_of(tiny_llama()), random_prompts([60])[0]
    request = GenerationRequest("old", [prompt], SamplingParams(max_new_tokens=300, min_new_tokens=300), stream=True)
    throttle = Throttle(after=3)
    engine.submit(request, throttle)
    assert throttle.reached.wait(TIMEOUT)
    engine.load_weights(WeightsUpdate(1, "full", dict(tiny_llama(seed=1).state_dict())))
    sample = samples(engine, [prompt], SamplingParams(max_new_tokens=5))[0, 0]
    throttle.released.set()
    assert_same(sample.logprobs, reference_logprobs(tiny_llama(seed=1), prompt, sample.token_ids))


def test_cancel_frees_the_rows(engine_of) -> None:
    engine, prompts = engine_of(tiny_llama(), max_rows=2), random_prompts([8] * 4)
    request = GenerationRequest("gone", prompts, SamplingParams(max_new_tokens=400, min_new_tokens=400), stream=True)
    throttle = Throttle(after=5)
    handle = engine.submit(request, throttle)
    assert throttle.reached.wait(TIMEOUT)
    engine.cancel(handle)
    throttle.released.set()
    _, found = gather(throttle.arrived, request)
    assert {sample.finish_reason for sample in found.values()} == {"cancelled"}
    assert all(len(sample.token_ids) < 400 for sample in found.values())
    assert [len(found[index, 0].token_ids) for index in (2, 3)] == [0, 0]  # these were waiting
    assert (engine.info().running, engine.info().waiting) == (0, 0)
    assert len(samples(engine, prompts, SamplingParams(max_new_tokens=5))) == 4
    engine.cancel(handle)  # unknown by now


def test_closing_tells_every_request(engine_of) -> None:
    engine = engine_of(tiny_llama(), max_rows=2)
    params = SamplingParams(max_new_tokens=400, min_new_tokens=400)
    throttles = [Throttle(after=1), Throttle(after=1)]
    for throttle in throttles:
        engine.submit(GenerationRequest("r", random_prompts([8, 9]), params, stream=True), throttle)
    assert throttles[0].reached.wait(TIMEOUT)
    engine.close()
    for throttle in throttles:
        last = list(throttle.arrived.queue)[-1]
        assert isinstance(last.error, UnavailableError)  # type: ignore[union-attr]
    with pytest.raises(UnavailableError):
        engine.submit(GenerationRequest("late", random_prompts([3]), params), print)
    with pytest.raises(UnavailableError):
        engine.load_weights(WeightsUpdate(1, "full", {"model.norm.weight": torch.ones(32)}))


def test_a_failing_step_fails_its_requests_and_not_the_engine(engine_of, monkeypatch) -> None:
    engine, prompts = engine_of(tiny_llama()), random_prompts([5, 6])
    original = engine._decoder.decode
    broken = [True]

    def failing(*args: object) -> torch.Tensor:
        if broken.pop() if broken else False:
            raise RuntimeError("no memory left")
        return original(*args)

    monkeypatch.setattr(engine._decoder, "decode", failing)
    with pytest.raises(Exception, match="generation failed: no memory left"):
        samples(engine, prompts, SamplingParams(max_new_tokens=4))
    assert len(samples(engine, prompts, SamplingParams(max_new_tokens=4))) == 2


def test_a_callback_that_raises_harms_nobody_else(engine_of) -> None:
    engine = engine_of(tiny_llama())

    def bad(event: Event) -> None:
        raise RuntimeError("callback")

    engine.submit(GenerationRequest("bad", random_prompts([5]), SamplingParams(max_new_tokens=5), stream=True), bad)
    found = samples(engine, random_prompts([6]), SamplingParams(max_new_tokens=5))
    assert isinstance(found[0, 0], SampleFinished)


def test_an_engine_that_is_still_loading_says_so() -> None:
    engine = TransformersEngine(tiny_llama(), precision="fp32")
    with pytest.raises(UnavailableError, match="still being loaded"):
        engine.info()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; `make gpu-check` runs this")
def test_recorded_steps_give_what_single_steps_give() -> None:
    """Rows and tokens are rounded up in a recorded step; samples of many lengths come and go."""
    prompts, found = random_prompts(range(3, 40)), []
    for recorded in (True, False):
        engine = TransformersEngine(tiny_llama(), precision="fp32", device="cuda", max_rows=12)
        engine.start()
        engine._graphs.enabled = engine._graphs.enabled and recorded
        parts = [
            samples(engine, [one], SamplingParams(max_new_tokens=9 + 3 * n, seed=n)) for n, one in enumerate(prompts)
        ]
        together = samples(engine, prompts, SamplingParams(max_new_tokens=70, seed=5))
        assert engine._graphs.enabled == recorded
        assert bool(engine._graphs._graphs) == recorded
        engine.close()
        found.append([*(part[0, 0] for part in parts), *(together[index, 0] for index in range(len(prompts)))])
    for one, other in zip(*found, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert_same(one.logprobs, other.logprobs)
