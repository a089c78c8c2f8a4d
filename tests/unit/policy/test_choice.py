"""Every architecture gets a decoder that gives its own log-probabilities, or a sentence."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from engine_client import random_prompts, reference_logprobs, samples
from numeric import assert_same
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from services.policy.engine import GenerationRequest, SamplingParams, WeightsUpdate
from services.policy.engines.choice import choose_decoder, engine_verdict
from services.policy.engines.transformers_engine import TransformersEngine, with_decoder
from steersman.errors import ConfigError, InternalError, UnavailableError
from steersman.nn.tiny import tiny_model
from steersman.testing.models import tiny_llama

DECODERS = {
    "llama": "llama",
    "qwen3": "llama",
    "mistral": "llama",
    "gemma2": "generic",
    "gemma3_text": "generic",
    "gpt_oss": "generic",
    "mixtral": "generic",
    "deepseek_v3": "generic",
    "cohere": "generic",
    "llama4_text": "cached",
    "qwen3_5_text": "cached",
    "bloom": "cached",
    "mpt": "cached",
    "gptj": "cached",
}


@pytest.mark.parametrize("family", DECODERS)
def test_the_fastest_decoder_that_is_right(family: str) -> None:
    name, verdict = engine_verdict(CONFIG_MAPPING[family](), with_decoder)
    assert name == DECODERS[family]
    assert verdict.outcome == ("plain" if name == "cached" else "agrees")
    assert verdict.difference < 3e-4


def test_what_no_decoder_computes_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="RobertaConfig cannot run on the transformers engine: its log-prob"):
        choose_decoder(CONFIG_MAPPING["roberta"](), with_decoder)


@pytest.mark.parametrize("decoder", ["cached", "uncached"])
def test_the_plain_decoders_wait_share_move_and_take_new_weights(decoder) -> None:
    reference = tiny_llama()
    engine = TransformersEngine(tiny_llama(), precision="fp32", device="cpu", max_rows=3, decoder=decoder)
    engine.start()
    prompts = random_prompts([3, 1, 20, 7])
    params = SamplingParams(max_new_tokens=12, seed=3, stop_token_ids=tuple(range(50, 90)))
    for (prompt, _), sample in samples(engine, prompts, params, n=3).items():
        assert_same(sample.logprobs, reference_logprobs(reference, prompts[prompt], sample.token_ids))
    other = tiny_llama(seed=1)
    engine.load_weights(WeightsUpdate(1, "full", {name: one.data for name, one in other.named_parameters()}))
    for (prompt, _), sample in samples(engine, prompts, params).items():
        assert_same(sample.logprobs, reference_logprobs(other, prompts[prompt], sample.token_ids))
    engine.close()


def test_a_prompt_of_one_token_is_the_first_that_an_engine_may_see() -> None:
    engine = TransformersEngine(tiny_llama(), precision="fp32", device="cpu")
    engine.start()
    prompt = np.array([7], np.int32)
    sample = samples(engine, [prompt], SamplingParams(max_new_tokens=4, min_new_tokens=4))[0, 0]
    engine.close()
    assert_same(sample.logprobs, reference_logprobs(tiny_llama(), prompt, sample.token_ids))


def test_weights_that_cannot_be_put_in_place_end_the_engine_and_somebody_is_told() -> None:
    """Old and new weights may be mixed: callers get an error, nobody hangs, and the process learns of it."""
    died = threading.Event()
    engine = TransformersEngine(tiny_llama(), precision="fp32", device="cpu", on_death=died.set)
    engine.start()
    prepared = engine._store.prepare

    def broken(update):
        prepared(update)

        def place():
            raise RuntimeError("no memory")

        return place

    engine._store.prepare = broken  # type: ignore[method-assign]
    weights = {name: one.data for name, one in tiny_llama().named_parameters()}
    with pytest.raises(InternalError, match="weights version 1 could not be put in place"):
        engine.load_weights(WeightsUpdate(1, "full", weights))
    assert died.wait(10)
    with pytest.raises(UnavailableError):
        engine.submit(GenerationRequest("late", random_prompts([4]), SamplingParams(max_new_tokens=2)), lambda _: None)
    with pytest.raises(UnavailableError):
        engine.load_weights(WeightsUpdate(2, "full", weights))
    engine.close()


def test_closing_is_no_death() -> None:
    died = threading.Event()
    model = tiny_model(AutoModelForCausalLM, CONFIG_MAPPING["llama"]())
    engine = TransformersEngine(model, precision="fp32", device="cpu", on_death=died.set)
    engine.start()
    engine.close()
    assert not died.is_set()
