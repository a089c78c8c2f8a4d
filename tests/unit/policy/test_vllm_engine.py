"""The vLLM engine against transformers, on a tiny random model: fp32 on a CPU (`make test-vllm`), bf16 on a GPU
(`make test-gpu`).
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engine_client import TIMEOUT, collect, gather, random_prompts, reference_logprobs, samples
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from services.policy.engine import (
    Event,
    GenerationRequest,
    PromptScored,
    SampleFinished,
    SamplingParams,
    TokenEvent,
    WeightsUpdate,
)
from steersman.errors import InvalidArgumentError, UnavailableError
from steersman.testing.models import save_model_folder, tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
LONG = SamplingParams(max_new_tokens=400, min_new_tokens=400)
EXACT = pytest.mark.parametrize("device", ["cpu"], indirect=True, scope="module")
"""What bf16 does not give: the same tokens as transformers, or as in another batch."""
BF16_MISMATCH = 0.04
"""Mean difference of log-probabilities that a GPU may show against the fp32 forward."""


def model(seed: int = 0) -> PreTrainedModel:
    """Heads of 32: vLLM has no CPU kernel for smaller ones."""
    return tiny_llama(hidden_size=128, seed=seed)


def build(folder: Path, device: str, **options: Any) -> Any:
    from services.policy.engines.vllm_engine import VllmEngine
    from services.policy.engines.vllm_settings import VllmSettings

    precision = "fp32" if device == "cpu" else "bf16"
    own = {"on_death": options.pop("on_death", lambda: None), "device": device, "precision": precision}
    given = VllmSettings(**{"eager": True, "max_running": 16, "memory_share": 0.2} | options)
    engine = VllmEngine(folder, given, kv_cache_tokens=8192, **own)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("model"), model())


@pytest.fixture(scope="module")
def started(folder: Path, device: str) -> Iterator[Any]:
    engine = build(folder, device, lora="auto" if device == "cpu" else "merge")
    yield engine
    engine.close()


@pytest.fixture
def engine(started: Any) -> Any:
    """The one engine of this module, with the weights of the start."""
    if started.info().weights_version:
        started.load_weights(full(started.info().weights_version + 1, model()))
    return started


@pytest.fixture(scope="module")
def adapting(folder: Path, device: str) -> Iterator[Any]:
    engine = build(folder, device, lora="adapter" if device == "cpu" else "auto", max_lora_rank=8)
    yield engine
    engine.close()


def full(version: int, source: PreTrainedModel) -> WeightsUpdate:
    return WeightsUpdate(version, "full", dict(source.state_dict()))


def adapter(seed: int, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any], PreTrainedModel]:
    """State dict and configuration as PEFT saves them, and the merged model."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings))
    wrapped = get_peft_model(model(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    plain = json.loads(json.dumps(config.to_dict(), default=list))
    return tensors, plain, wrapped.merge_and_unload()


def assert_near(engine: Any, found: np.ndarray, expected: np.ndarray) -> None:
    """Log-probabilities [R] of the engine and of the fp32 forward."""
    if engine.info().dtype == "float32":
        np.testing.assert_allclose(found, expected, atol=1e-4)
    else:
        assert np.abs(found - expected).mean() <= BF16_MISMATCH


def assert_serves(engine: Any, reference: PreTrainedModel) -> None:
    prompts = random_prompts([4, 40])
    version = engine.info().weights_version
    for (index, _), sample in samples(engine, prompts, SamplingParams(max_new_tokens=12, seed=1)).items():
        expected = reference_logprobs(reference, prompts[index], sample.token_ids)
        assert_near(engine, sample.logprobs, expected)
        assert sample.weights_versions == (version,)


@torch.no_grad()
def endless_logprobs(reference: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 [R] where the end token may not be drawn: vLLM reports the distribution without it."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    logits = reference(ids[None]).logits[0, len(prompt) - 1 : -1].float()
    logits[:, 2] = -torch.inf
    return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].numpy()


def first_tokens(engine: Any, request: GenerationRequest, count: int = 5) -> tuple[int, queue.Queue[Event]]:
    """Submits a streamed request and waits for some of its tokens."""
    arrived: queue.Queue[Event] = queue.Queue()
    handle = engine.submit(request, arrived.put)
    end = time.monotonic() + TIMEOUT
    while arrived.qsize() < count:
        assert time.monotonic() < end
        time.sleep(0.001)
    return handle, arrived


def test_logprobs_are_of_the_distribution_that_was_sampled_from(engine) -> None:
    reference, prompts = model(), random_prompts([5, 1, 40, 17])
    for params in (SamplingParams(max_new_tokens=16, seed=3), SamplingParams(max_new_tokens=16, temperature=0.5)):
        for (index, _), sample in samples(engine, prompts, params, n=2).items():
            expected = reference_logprobs(reference, prompts[index], sample.token_ids, params.temperature)
            assert_near(engine, sample.logprobs, expected)
            assert (sample.token_ids.dtype, sample.logprobs.dtype) == (np.int32, np.float32)
    # With top-k the probabilities of what remains sum to one: the drawn token is one of five.
    prompt, params = prompts[:1], SamplingParams(max_new_tokens=16, top_k=5)
    sample = samples(engine, prompt, params)[0, 0]
    ids = torch.from_numpy(np.concatenate([prompt[0], sample.token_ids])).long()
    with torch.no_grad():
        kept = reference(ids[None]).logits[0, len(prompt[0]) - 1 : -1].topk(5)
    places = (kept.indices == ids[len(prompt[0]) :, None]).float().max(1, keepdim=True)
    known = places.values[:, 0].bool().numpy()  # rounding may swap the fifth and the sixth
    assert known.mean() >= (1.0 if engine.info().dtype == "float32" else 0.7)
    expected = kept.values.log_softmax(-1).gather(1, places.indices)[:, 0].numpy()
    assert_near(engine, sample.logprobs[known], expected[known])


def test_a_prompt_has_the_models_own_log_probabilities(engine) -> None:
    prompts = random_prompts([20, 1, 20])
    prompts[2] = prompts[0]  # vLLM's prefix cache holds it
    params = SamplingParams(max_new_tokens=2, temperature=0.5, top_logprobs=2)
    events, _ = collect(engine, GenerationRequest("t", prompts, params, n=2, stream=True, score_prompts=True))
    found = {event.prompt_index: event for event in events if isinstance(event, PromptScored)}
    assert sum(isinstance(event, PromptScored) for event in events) == len(found) == 3
    for index, prompt in enumerate(prompts):
        scored = found[index]
        assert (len(scored.logprobs), scored.top_ids.shape) == (len(prompt) - 1, (len(prompt) - 1, 2))
        if len(prompt) > 1:
            assert_near(engine, scored.logprobs, reference_logprobs(model(), prompt[:1], prompt[1:]))
            assert (scored.top_logprobs[:, 0] >= scored.logprobs - 1e-6).all()
            assert (scored.top_logprobs[:, 0] >= scored.top_logprobs[:, 1]).all()


@EXACT
def test_greedy_equals_generate(engine) -> None:
    prompt = random_prompts([21])
    found = samples(engine, prompt, SamplingParams(max_new_tokens=12, temperature=0.0))[0, 0]
    ids = torch.from_numpy(prompt[0]).long()[None]
    expected = model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    np.testing.assert_array_equal(found.token_ids, expected[0, 21:].numpy())


@EXACT
def test_seeds_stops_and_limits(engine) -> None:
    prompts = random_prompts([5, 9])
    first, again = (samples(engine, prompts, SamplingParams(max_new_tokens=24, seed=5), n=3) for _ in range(2))
    other = samples(engine, prompts, SamplingParams(max_new_tokens=24, seed=6), n=3)
    for place, sample in first.items():
        np.testing.assert_array_equal(sample.token_ids, again[place].token_ids)
        assert sample.token_ids.tolist() != other[place].token_ids.tolist()
    assert len({tuple(first[0, index].token_ids) for index in range(3)}) == 3

    stops = tuple(range(20, 120))
    for minimum in (0, 8):
        params = SamplingParams(max_new_tokens=40, stop_token_ids=stops, min_new_tokens=minimum)
        for sample in samples(engine, prompts, params, n=3).values():
            assert sample.finish_reason == "stop"
            assert sample.token_ids[-1] in (*stops, 2)
            assert len(sample.token_ids) > minimum
            assert not set(sample.token_ids[:-1]) & {*stops, 2}
    with pytest.raises(InvalidArgumentError, match="the model's context holds 512"):
        samples(engine, random_prompts([512]), SamplingParams(max_new_tokens=1))
    sample = samples(engine, random_prompts([505]), LONG)[0, 0]
    assert (len(sample.token_ids), sample.finish_reason) == (7, "length")


def test_prompts_that_do_not_fit_into_one_step(engine) -> None:
    """On a CPU vLLM dies of a prompt in parts whose request has a seed."""
    prompts, reference = random_prompts([400] * 16), model()
    for (index, _), sample in samples(engine, prompts, SamplingParams(max_new_tokens=4, seed=1)).items():
        assert_near(engine, sample.logprobs, reference_logprobs(reference, prompts[index], sample.token_ids))


def test_the_samples_of_a_prompt_compute_it_once(engine) -> None:
    before = dict(engine.info().details)
    prompt = random_prompts([200], seed=7)
    samples(engine, prompt, SamplingParams(max_new_tokens=4), n=8)
    after = engine.info().details
    asked = after["prefix_tokens"] - before.get("prefix_tokens", 0)
    cached = after["prefix_tokens_cached"] - before.get("prefix_tokens_cached", 0)
    assert asked == 8 * 200
    assert cached == 7 * 192  # whole blocks of 32


@EXACT
def test_samples_arrive_as_they_finish_and_tokens_when_asked(engine) -> None:
    short = GenerationRequest("short", random_prompts([6]), SamplingParams(max_new_tokens=3))
    order: queue.Queue[Event] = queue.Queue()
    long = GenerationRequest("long", random_prompts([7]), SamplingParams(max_new_tokens=200, min_new_tokens=200))
    engine.submit(long, order.put)
    collect(engine, short)
    assert order.empty()
    gather(order, long)

    params = SamplingParams(max_new_tokens=8, top_logprobs=3, seed=4)
    prompt = random_prompts([9])[0]
    events, found = collect(engine, GenerationRequest("s", [prompt], params, stream=True))
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [event.token_id for event in tokens] == found[0, 0].token_ids.tolist()
    np.testing.assert_array_equal([event.logprob for event in tokens], found[0, 0].logprobs)
    ids = torch.from_numpy(np.concatenate([prompt, found[0, 0].token_ids])).long()
    with torch.no_grad():
        expected = model()(ids[None]).logits[0, len(prompt) - 1 :].log_softmax(-1).topk(3)
    for place, event in enumerate(tokens):
        assert [token for token, _ in event.top_logprobs] == expected.indices[place].tolist()
        np.testing.assert_allclose([value for _, value in event.top_logprobs], expected.values[place], atol=1e-4)


def test_cancelling_really_aborts(engine) -> None:
    """Twice as many samples as there is room for; afterwards the room is free at once."""
    request = GenerationRequest("gone", random_prompts([8] * 32), LONG, stream=True)
    handle, arrived = first_tokens(engine, request, 40)
    engine.cancel(handle)
    _, found = gather(arrived, request)
    assert {sample.finish_reason for sample in found.values()} == {"cancelled"}
    assert all(len(sample.token_ids) < 400 for sample in found.values())
    assert [len(found[index, 0].token_ids) for index in (30, 31)] == [0, 0]  # these were waiting
    assert (engine.info().running, engine.info().waiting) == (0, 0)
    start = time.monotonic()
    assert len(samples(engine, random_prompts([8] * 16), SamplingParams(max_new_tokens=2))) == 16
    assert engine.info().details["kv_cache_usage"] < 0.5, "vLLM still holds what was cancelled"
    engine.cancel(handle)  # unknown by now
    assert time.monotonic() - start < TIMEOUT


def test_full_weights_serve_running_samples_and_forget_old_prefixes(engine) -> None:
    version, prompt = engine.info().weights_version, random_prompts([200])[0]
    request = GenerationRequest("swap", [prompt], SamplingParams(max_new_tokens=250, min_new_tokens=250), stream=True)
    _, arrived = first_tokens(engine, request)
    engine.load_weights(full(version + 1, model(seed=1)))
    events, found = gather(arrived, request)
    sample = found[0, 0]
    assert sample.weights_versions == (version, version + 1)
    versions = [event.weights_version for event in events if isinstance(event, TokenEvent)]
    swapped = versions.index(version + 1)
    assert versions == [version] * swapped + [version + 1] * (250 - swapped)
    # What came later is of the new weights, over keys and values that were computed anew.
    expected = endless_logprobs(model(seed=1), prompt, sample.token_ids)
    assert_near(engine, sample.logprobs[swapped:], expected[swapped:])
    assert np.abs(sample.logprobs[:swapped] - expected[:swapped]).mean() > 3 * BF16_MISMATCH
    again = samples(engine, [prompt], SamplingParams(max_new_tokens=20))[0, 0]
    assert again.weights_versions == (version + 1,)
    assert_near(engine, again.logprobs, reference_logprobs(model(seed=1), prompt, again.token_ids))


def test_partial_merged_and_again_full_weights(engine) -> None:
    """What an update leaves out stays; an adapter is merged on the weights of the start."""
    version = engine.info().weights_version
    part = {name: tensor for name, tensor in model(seed=2).state_dict().items() if "layers.1.self_attn.q_proj" in name}
    mixed = model()
    mixed.load_state_dict(part, strict=False)
    engine.load_weights(WeightsUpdate(version + 1, "full", part))
    assert_serves(engine, mixed)
    for step in (2, 3):
        tensors, config, merged = adapter(seed=step)
        engine.load_weights(WeightsUpdate(version + step, "lora", tensors, config))
        assert_serves(engine, merged)
    engine.load_weights(full(version + 4, model(seed=3)))  # the tied head, too
    assert_serves(engine, model(seed=3))
    assert len(list(engine._scratch.iterdir())) == 1


def test_what_does_not_fit_changes_nothing(engine) -> None:
    version = engine.info().weights_version
    for tensors, words in (
        ({"model.norm.bias": torch.zeros(128)}, "which the served model does not have"),
        ({"model.norm.weight": torch.zeros(127)}, r"has shape \[127\]"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            engine.load_weights(WeightsUpdate(version + 1, "full", tensors))
    assert engine.info().weights_version == version
    assert_serves(engine, model())


def test_a_transfer_that_breaks_brings_the_old_weights_back(engine, monkeypatch) -> None:
    version = engine.info().weights_version
    original = engine._checkpoint.after

    def damaged(update: WeightsUpdate) -> Any:
        plan = original(update)
        path = next(path for path in plan.paths.values() if str(engine._scratch) in path)
        Path(path).write_bytes(Path(path).read_bytes()[:-1000])
        return plan

    monkeypatch.setattr(engine._checkpoint, "after", damaged)
    with pytest.raises(Exception, match="vLLM"):
        engine.load_weights(full(version + 1, model(seed=1)))
    assert engine.info().weights_version == version
    assert_serves(engine, model())


def test_json_constraints_become_vllms_and_others_are_refused(engine, folder) -> None:
    from services.policy.constrain import json_constraint
    from steersman.testing.models import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        }
    )
    constraint = json_constraint(tokenizer, schema, engine.info())
    params = SamplingParams(max_new_tokens=40, seed=2)
    _, found = collect(engine, GenerationRequest("json", random_prompts([6]), params, n=3, constraint=constraint))
    for sample in found.values():
        assert json.loads(tokenizer.decode(sample.token_ids, skip_special_tokens=True)) in ({"ok": True}, {"ok": False})
        assert sample.finish_reason == "stop"
    with pytest.raises(InvalidArgumentError, match="only constraints by JSON schema"):
        collect(engine, GenerationRequest("other", random_prompts([6]), params, constraint=lambda *_: None))


def test_adapters_have_a_name_for_every_version(adapting) -> None:
    """Running samples end with the adapter that they began with; an adapter that nobody needs is freed."""
    version, prompt = adapting.info().weights_version, random_prompts([40])[0]
    tensors, config, merged = adapter(seed=1)
    adapting.load_weights(WeightsUpdate(version + 1, "lora", tensors, config))
    assert_serves(adapting, merged)
    request = GenerationRequest("old", [prompt], SamplingParams(max_new_tokens=150, min_new_tokens=150), stream=True)
    _, arrived = first_tokens(adapting, request)
    newer, config, newer_merged = adapter(seed=2)
    adapting.load_weights(WeightsUpdate(version + 2, "lora", newer, config))
    assert_serves(adapting, newer_merged)
    _, found = gather(arrived, request)
    assert found[0, 0].weights_versions == (version + 1,)
    expected = endless_logprobs(merged, prompt, found[0, 0].token_ids)
    assert_near(adapting, found[0, 0].logprobs, expected)
    # The old one is freed after its last sample was handed out.
    deadline = time.monotonic() + 30
    while len(kept := [path.name for path in adapting._scratch.iterdir()]) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert kept == [f"adapter-{version + 2}"]
    # Full weights end the time of adapters; the next adapter lies on the weights of the start again.
    adapting.load_weights(full(version + 3, model(seed=4)))
    assert_serves(adapting, model(seed=4))
    adapting.load_weights(WeightsUpdate(version + 4, "lora", newer, config))
    assert_serves(adapting, newer_merged)


def test_an_adapter_that_vllm_cannot_use_changes_nothing(adapting) -> None:
    version = adapting.info().weights_version
    tensors, config, _ = adapter(seed=3, r=16)
    with pytest.raises(InvalidArgumentError, match="vLLM cannot use the adapter"):
        adapting.load_weights(WeightsUpdate(version + 1, "lora", tensors, config))
    assert adapting.info().weights_version == version
    assert len(samples(adapting, random_prompts([5]), SamplingParams(max_new_tokens=3))) == 1


@EXACT
def test_death_and_close_are_told(folder, device) -> None:
    told = threading.Event()
    before = set(psutil.Process().children(recursive=True))
    engine = build(folder, device, on_death=told.set)
    request = GenerationRequest("r", random_prompts([8, 9]), LONG, stream=True)
    _, arrived = first_tokens(engine, request, 2)
    for process in set(psutil.Process().children(recursive=True)) - before:
        if "tracker" not in " ".join(process.cmdline()):
            process.kill()
    with pytest.raises(UnavailableError, match="have died"):
        gather(arrived, request)
    assert told.wait(TIMEOUT)
    engine.close()
    with pytest.raises(UnavailableError):
        engine.submit(request, print)
    with pytest.raises(UnavailableError):
        engine.load_weights(full(1, model()))
    assert not engine._scratch.exists()


def test_closing_tells_every_request(adapting) -> None:
    """The last test of this engine."""
    request = GenerationRequest("r", random_prompts([8, 9]), LONG, stream=True)
    _, arrived = first_tokens(adapting, request, 2)
    adapting.close()
    last = list(arrived.queue)[-1]
    assert isinstance(last.error, UnavailableError)  # type: ignore[union-attr]
    assert not any(isinstance(event, SampleFinished) for event in arrived.queue)
