"""An ILQL policy is served as it was trained: through the weights transaction, from its folder, merged, and over the
gateway; what cannot sample with its heads refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import openai
import pytest
import torch
from ilql_served import greedy, of_folder, served_logprobs
from stage_context import stage_context

from services.gateway.testing import gateway_config, running_gateway
from services.policy.build import build_engine
from services.policy.config import PolicyConfig
from services.policy.weights import WeightsServicer
from steersman.config.manifest import IlqlStage, Lora, Optimizer
from steersman.errors import ConfigError, FailedPreconditionError
from steersman.nn.forward import predicting_states, unwrapped
from steersman.nn.load import load_causal_lm, load_tokenizer
from steersman.nn.lora import merge_to_folder
from steersman.nn.packed import pack
from steersman.nn.serialize import write_safetensors
from steersman.nn.tokens import prompt_ids
from steersman.rpc.wire import pack_rows, unpack_rows
from steersman.testing.fake_engine import FakeEngine
from steersman.v1 import common_pb2, policy_pb2, policy_pb2_grpc, weights_pb2
from training.context import DataFiles, StageContext
from training.evaluate import read_weights
from training.offline.ilql import IlqlModel, IlqlTrainer, run_ilql
from training.online.clients import PolicyReplica
from training.online.pool import PolicyPool
from training.online.publication import WeightsPayload

PROMPTS = [np.arange(4, 12, dtype=np.int32), np.arange(30, 33, dtype=np.int32)]
TEMPERATURE = 0.8


def spec(lora: Lora | None) -> IlqlStage:
    rates = Optimizer(learning_rate=1e-2, warmup_ratio=0)
    sizes = {"max_steps": 6, "batch_size": 8, "max_length": 256}
    return IlqlStage(lora=lora, beta=6.0, polyak=0.5, heads_learning_rate=3e-2, optimizer=rates, **sizes)


@pytest.fixture
def context(tmp_path: Path, tiny_model: Path) -> StageContext:
    rows = [
        {
            "prompt": [{"role": "user", "content": "red"}],
            "completion": [{"role": "assistant", "content": "yes" if number % 2 else "no"}],
            "reward": 1.0 if number % 2 else -1.0,
        }
        for number in range(8)
    ]
    path = tmp_path / "returns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return stage_context(tmp_path, tiny_model, {"returns": DataFiles(path)})


def generate(target: str) -> tuple[list[list[int]], list[np.ndarray]]:
    """(answers, their log-probabilities) of two samples of each prompt, by the service."""
    sampling = common_pb2.SamplingParams(max_new_tokens=8, seed=5, temperature=TEMPERATURE)
    request = policy_pb2.GenerateRequest(prompts=pack_rows(PROMPTS), n=2, sampling=sampling)
    with grpc.insecure_channel(target) as channel:
        found = list(policy_pb2_grpc.PolicyServiceStub(channel).Generate(request, timeout=30))
    by_place = {(one.prompt_index, one.sample_index): one for one in found}
    ordered = [by_place[prompt, sample] for prompt in range(2) for sample in range(2)]
    tokens = [unpack_rows(one.token_ids, np.int32, "token_ids")[0].tolist() for one in ordered]
    return tokens, [unpack_rows(one.logprobs, np.float32, "logprobs")[0] for one in ordered]


def largest_difference(model: Any, heads: Any, made: tuple[list[list[int]], list[np.ndarray]]) -> float:
    answers, logprobs = made
    wanted = [
        served_logprobs(model, heads, PROMPTS[number // 2].tolist(), answer, TEMPERATURE).numpy()
        for number, answer in enumerate(answers)
    ]
    return max(float(np.abs(one - other).max()) for one, other in zip(wanted, logprobs, strict=True))


@torch.no_grad()
def trainer_difference(trainer: IlqlModel, made: tuple[list[list[int]], list[np.ndarray]]) -> float:
    """The same by the trainer's packed forward and its own modules."""
    answers = [np.array(answer, np.int32) for answer in made[0]]
    packed = pack([(PROMPTS[0], answers[:2]), (PROMPTS[1], answers[2:])])
    hidden = predicting_states(trainer.policy, packed)
    advantage = torch.minimum(*(target(hidden) for target in trainer.targets)) - trainer.heads.v(hidden)
    scores = unwrapped(trainer.policy).lm_head(hidden) + trainer.heads.beta * advantage
    wanted = (scores / TEMPERATURE).log_softmax(-1).gather(1, packed.targets[:, None])[:, 0].numpy()
    return float(np.abs(wanted - np.concatenate(made[1])).max())


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_the_heads_travel_in_the_weights_transaction(cluster, context, tiny_model, lora) -> None:
    cluster.start_policy(tiny_model)
    target = cluster.endpoints["policy"][0]
    before = generate(target)
    run_ilql(spec(lora), context)
    folder = context.stage_dir / "model"
    trainer = IlqlModel(spec(lora), context)
    IlqlTrainer(spec(lora), trainer, _rows(context, lora), context, _alone()).run()
    replica = PolicyReplica(target, cluster.endpoints["weights"][0], 10, lambda text: None)
    fingerprint = replica.info().model.tokenizer_fingerprint
    pool = PolicyPool([replica], fingerprint)
    pool.publish(trainer.payload(torch.float32))
    made = generate(target)
    assert trainer_difference(trainer, made) < 1e-4
    assert largest_difference(*of_folder(folder), made) < 1e-4
    # The heads move the distribution far: nothing else could stand for them.
    assert largest_difference(load_causal_lm(folder), {}, made) > 0.1
    # A policy without heads takes their place, as when base and ILQL are compared.
    pool.publish(WeightsPayload("full", read_weights(tiny_model)))
    again = generate(target)
    assert again[0] == before[0]
    assert largest_difference(load_causal_lm(tiny_model), {}, again) < 1e-4
    pool.publish(WeightsPayload("full", read_weights(folder)))
    assert largest_difference(*of_folder(folder), generate(target)) < 1e-4
    # What does not fit is refused, and what was served stays.
    broken = {**read_weights(folder)}
    broken.pop("ilql.v.last.bias")
    with pytest.raises(Exception, match=r"lacks 'ilql\.v\.last\.bias'"):
        pool.publish(WeightsPayload("full", broken))
    pool.close()


async def test_folder_merge_and_gateway_answer_with_the_same_distribution(cluster, context, tiny_model, tmp_path):
    """The stage's folder, and what `steersman merge` makes of its adapter."""
    run_ilql(spec(Lora(rank=4)), context)
    merged = tmp_path / "merged"
    merge_to_folder(tiny_model, context.stage_dir / "adapter", merged)
    for folder in (context.stage_dir / "model", merged):
        cluster.start_policy(folder)
    targets = cluster.endpoints["policy"]
    stage, by_hand = generate(targets[0]), generate(targets[1])
    assert largest_difference(*of_folder(context.stage_dir / "model"), stage) < 1e-4
    assert stage[0] == by_hand[0]
    np.testing.assert_allclose(np.concatenate(stage[1]), np.concatenate(by_hand[1]), atol=1e-5)
    tokenizer = load_tokenizer(merged)
    messages = [{"role": "user", "content": "red"}]
    model, heads = of_folder(merged)
    answer = greedy(model, heads, prompt_ids(tokenizer, messages), [2], 12)
    alone = greedy(model, {}, prompt_ids(tokenizer, messages), [2], 12)
    assert answer != alone
    async with (
        running_gateway(gateway_config(targets[1])) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        said = await client.chat.completions.create(
            model="steersman", messages=messages, temperature=0, max_tokens=12, logprobs=True
        )
    assert said.choices[0].message.content == tokenizer.decode(answer, skip_special_tokens=True)
    reported = [one.logprob for one in said.choices[0].logprobs.content]
    wanted = served_logprobs(model, heads, prompt_ids(tokenizer, messages), answer).tolist()
    assert reported == pytest.approx(wanted[: len(reported)], abs=1e-4)


@pytest.mark.parametrize("engine", ["vllm", "tgi"])
def test_engines_that_cannot_sample_with_the_heads_refuse_in_one_sentence(context, tmp_path, engine) -> None:
    run_ilql(spec(None), context)
    options = {"tgi": {"url": "http://127.0.0.1:1"}} if engine == "tgi" else {}
    config = PolicyConfig(model=str(context.stage_dir / "model"), engine=engine, **options)
    with pytest.raises(ConfigError, match=f"Q and V heads of ILQL, which engine {engine} cannot sample with") as caught:
        build_engine(config)
    assert "\n" not in str(caught.value)
    servicer = WeightsServicer(FakeEngine(), config)  # type: ignore[arg-type]
    path = tmp_path / "weights"
    with path.open("w+b") as file:
        write_safetensors(read_weights(context.stage_dir / "model"), file)
    with pytest.raises(FailedPreconditionError, match=f"which engine {engine} cannot sample with"):
        servicer._apply(_transaction(path))


def _transaction(path: Path) -> Any:
    from services.policy.weights import _Transaction
    from steersman.nn.serialize import digest_of

    data = path.read_bytes()
    kind = weights_pb2.WEIGHTS_KIND_FULL
    url = f"file://{path}"
    manifest = weights_pb2.WeightsManifest(kind=kind, size=len(data), digest=digest_of(data), artifact_url=url)
    return _Transaction(1, manifest, path.open("rb"))


def _rows(context: StageContext, lora: Lora | None) -> Any:
    from training.offline.ilql_data import conversations_of

    return conversations_of(spec(lora), context, "train", load_tokenizer(context.policy_model), [2])


def _alone() -> Any:
    from training.parallel import Ranks

    return Ranks()
