"""Encoder-decoder policies through the real services: policy, reference, RL and rejection sampling, chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_rl import BANDIT, LIKES_LETTERS, PROMPTS, metrics
from transformers import AutoModelForSeq2SeqLM

from steersman.artifacts import manifest_of_hashes
from steersman.nn.load import load_tokenizer
from steersman.nn.tokens import prompt_ids
from steersman.testing.models import save_model_folder, tiny_t5, tiny_tokenizer

HEAD = {"critic": {"kind": "valueHead", "learningRate": 0.02}}
METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"ppo": HEAD, "lora": None},
    "nlpo": {"nlpo": {**HEAD, "topP": 0.95, "refreshEvery": 5}, "lora": None},
    "rloo": {"lora": None},
}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    return save_model_folder(folder, tiny_t5(seed=3), tiny_tokenizer(chat_template=None))


def start(cluster: Any, model: Path, **options: Any) -> None:
    cluster.start_policy(model)
    cluster.start_reference(model, merge_requests=options.get("mergeRequests", True))
    cluster.start_reward(LIKES_LETTERS, **options)


@pytest.mark.parametrize("algorithm", METHODS)
def test_it_learns_the_rewarded_token(algorithm: str, cluster: Any, t5: Path, run_manifest: Callable) -> None:
    start(cluster, t5)
    options = {**BANDIT, "algorithm": algorithm, "steps": 25, "promptsPerStep": 4, **METHODS[algorithm]}
    stage = run_manifest(cluster, t5, {"rl": {**options, "optimizer": {"learningRate": 0.02}}}, prompts=PROMPTS)
    rows = metrics(stage)
    assert rows[0]["reward"] < 0.5
    assert sum(row["reward"] for row in rows[-5:]) / 5 > 0.9
    assert max(row["mismatch_mean_abs"] for row in rows) < 1e-4  # service and trainer
    assert abs(rows[0]["kl"]) < 0.15 if algorithm == "nlpo" else abs(rows[0]["kl"]) < 1e-3  # trainer and reference
    AutoModelForSeq2SeqLM.from_pretrained(stage / "model")


def test_rejection_sampling_learns_it_too(cluster: Any, t5: Path, run_manifest: Callable) -> None:
    start(cluster, t5)
    options = {
        "rounds": 2,
        "promptsPerRound": 8,
        "samplesPerPrompt": 6,
        "batchSize": 8,
        "microBatchSize": 8,
        "generation": {"maxNewTokens": 16, "stop": list("abcdefghijklmnopqrstuvwxyz")},
        "optimizer": {"learningRate": 0.01},
        "lora": None,
    }
    stage = run_manifest(cluster, t5, {"rejectionSampling": options}, prompts=PROMPTS)
    AutoModelForSeq2SeqLM.from_pretrained(stage / "model")


def test_a_run_that_was_cut_ends_with_the_same_weights(
    cluster: Any, t5: Path, run_manifest: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.online.loop import RlLoop

    start(cluster, t5, mergeRequests=False)
    nlpo = {**HEAD, "refreshEvery": 2}
    options = {
        "rl": {**BANDIT, "algorithm": "nlpo", "steps": 4, "nlpo": nlpo, "deterministic": True, "checkpointEvery": 1}
    }
    unbroken = run_manifest(cluster, t5, options, prompts=PROMPTS, name="unbroken")
    save = RlLoop.save

    def dies(self: RlLoop, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RlLoop, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            run_manifest(cluster, t5, options, prompts=PROMPTS, name="cut")
    resumed = run_manifest(cluster, t5, options, prompts=PROMPTS, name="cut")
    assert manifest_of_hashes(resumed / "model") == manifest_of_hashes(unbroken / "model")


def test_greedy_answers_are_those_of_generate(cluster: Any, t5: Path) -> None:
    """Through the policy service's data plane, and as a chat."""
    import grpc

    from steersman.rpc.wire import pack_rows, unpack_rows
    from steersman.v1 import common_pb2, policy_pb2, policy_pb2_grpc

    cluster.start_policy(t5)
    tokenizer = load_tokenizer(t5)
    model = AutoModelForSeq2SeqLM.from_pretrained(t5)
    prompts = [
        np.array(prompt_ids(tokenizer, [{"role": "user", "content": text}]), np.int32) for text in ("a", "sum up")
    ]
    sampling = common_pb2.SamplingParams(max_new_tokens=9, temperature=0.0)
    with grpc.insecure_channel(cluster.endpoints["policy"][0]) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        found = {}
        for one in stub.Generate(policy_pb2.GenerateRequest(prompts=pack_rows(prompts), sampling=sampling)):
            found[one.prompt_index] = unpack_rows(one.token_ids, np.int32, "token_ids")[0]
        asked = policy_pb2.PolicyServiceChatRequest(
            messages=[common_pb2.Message(role="user", content="sum up")], sampling=sampling
        )
        said = "".join(one.delta for one in stub.Chat(asked))
    for index, prompt in enumerate(prompts):
        ids = model.generate(torch.tensor(prompt[None], dtype=torch.int64), max_new_tokens=9, do_sample=False)[0, 1:]
        assert found[index].tolist() == ids.tolist()
    assert said == tokenizer.decode(found[1], skip_special_tokens=True)
