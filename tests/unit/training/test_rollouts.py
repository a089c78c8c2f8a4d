"""Samples and scores of several replicas: what comes back depends on neither their number nor their failures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from steersman.config.manifest import Generation
from steersman.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from steersman.nn.load import load_tokenizer
from steersman.nn.tokens import tokenizer_fingerprint
from steersman.v1 import reference_pb2_grpc, reward_pb2, reward_pb2_grpc
from training.online.clients import PolicyReplica, ReferenceClient, RewardClient, Score
from training.online.pool import PolicyPool
from training.online.remote import calls
from training.online.rollout import Prompt, Rollouts, exclude_failed, score_item, to_batch

GENERATION = Generation(max_new_tokens=6)


def prompts_of(folder: Path, texts: list[str]) -> list[Prompt]:
    tokenizer = load_tokenizer(folder)
    return [
        Prompt(np.asarray(tokenizer(text)["input_ids"], np.int32), [{"role": "user", "content": text}])
        for text in texts
    ]


def silent(text: str) -> None: ...


def pool_of(cluster: Any, folder: Path) -> PolicyPool:
    ends = zip(cluster.endpoints["policy"], cluster.endpoints["weights"], strict=True)
    replicas = [PolicyReplica(data, control, 5.0, silent) for data, control in ends]
    return PolicyPool(replicas, tokenizer_fingerprint(load_tokenizer(folder)))


@contextmanager
def reward_service(answers: list[Any]) -> Iterator[RewardClient]:
    """A service that answers every call with the next of `answers`, the last one again and again: the values of its
    only scorer `odd`, or a status code."""

    class Servicer(reward_pb2_grpc.RewardServiceServicer):
        calls = 0

        def Score(self, request: Any, context: Any) -> Any:
            answer = answers[min(self.calls, len(answers) - 1)]
            self.calls += 1
            if isinstance(answer, grpc.StatusCode):
                context.abort(answer, "no room")
            scores = [
                reward_pb2.ItemScore(reward=value, parts=[reward_pb2.RewardPart(name="odd", value=value)])
                if value is not None
                else reward_pb2.ItemScore(error="odd: gave no value")
                for value in answer
            ]
            return reward_pb2.ScoreResponse(scores=scores)

    server = grpc.server(ThreadPoolExecutor(2))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(Servicer(), server)
    ready = health.HealthServicer()
    ready.set("steersman.v1.RewardService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(ready, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = RewardClient(f"127.0.0.1:{port}", "", 5.0, silent)
    try:
        yield client
    finally:
        client.close()
        server.stop(0)


def scores(answers: list[Any], count: int = 2) -> list[Score]:
    prompt = Prompt(np.arange(3, dtype=np.int32), [{"role": "user", "content": "a"}])
    items = [score_item(prompt, np.arange(2, dtype=np.int32), "b")] * count
    with reward_service(answers) as client:
        return calls().run(client.score(items))


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
    ],
)
def test_a_call_that_fails_is_repeated(code: grpc.StatusCode) -> None:
    assert [score.reward for score in scores([code, [1.0, 2.0]])] == [1.0, 2.0]


def test_what_keeps_failing_is_missing_and_says_who() -> None:
    for score in scores([grpc.StatusCode.INTERNAL]):
        assert math.isnan(score.reward)
        assert "RewardService at 127.0.0.1" in score.error
        assert "no room" in score.error


def test_what_the_service_refuses_is_raised() -> None:
    with pytest.raises(InvalidArgumentError, match=r"RewardService at .*: no room"):
        scores([grpc.StatusCode.INVALID_ARGUMENT])


def test_a_wrong_number_of_scores_is_a_sentence() -> None:
    first, _ = scores([[1.0, 2.0, 3.0]])
    assert math.isnan(first.reward)
    assert first.error.endswith("gave 3 scores for 2 answers")


def test_a_reward_that_is_missing_or_no_number_is_asked_for_again_and_never_0() -> None:
    again = scores([[None, 2.0], [1.0, 99.0]])
    assert [score.reward for score in again] == [1.0, 2.0]  # the other item keeps its first value
    never, other = scores([[math.nan, 2.0]])
    assert math.isnan(never.reward)
    assert never.error == "odd: the value is not finite"
    assert other.reward == 2.0


@pytest.mark.parametrize("deterministic", [False, True])
def test_samples_do_not_depend_on_the_number_of_replicas(cluster: Any, tiny_model: Path, deterministic: bool) -> None:
    """Nor do equal prompts get equal answers."""
    cluster.start_policy(tiny_model)
    cluster.start_reference(tiny_model, merge_requests=False)
    cluster.start_reward([{"name": "regex", "kind": "verifiable", "options": {"pattern": "a"}}], mergeRequests=False)
    fingerprint = tokenizer_fingerprint(load_tokenizer(tiny_model))
    prompts = prompts_of(tiny_model, ["same"] * 4 + ["one", "two", "three"])
    found = []
    for replicas in (1, 2, 3):
        if replicas > 1:
            cluster.start_policy(tiny_model)
        pool = pool_of(cluster, tiny_model)
        reward = RewardClient(cluster.endpoints["reward"][0], fingerprint, 5.0, silent)
        reference = ReferenceClient(cluster.endpoints["reference"][0], fingerprint, 5.0, silent)
        rollouts = Rollouts(
            pool, [reward], [reference], lambda ids: "a", GENERATION, (), silent, deterministic=deterministic
        )
        batch = to_batch(prompts, rollouts.collect(prompts, 4, 7)[0])
        found.append(batch)
        for client in (pool, reward, reference):
            client.close()
    texts = [tuple(response.tolist() for response in batch.responses) for batch in found]
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(response) for response in texts[0][:16]}) == 16
    for batch in found[1:]:
        for name in ("engine_logprobs", "ref_logprobs", "scores"):
            ours, theirs = getattr(batch, name), getattr(found[0], name)
            assert ours.equal(theirs) if deterministic else np.allclose(ours, theirs, atol=1e-5)


def test_a_replica_that_dies_leaves_its_work_to_the_others(cluster: Any, tiny_model: Path) -> None:
    cluster.start_policy(tiny_model)
    cluster.start_policy(tiny_model)
    prompts = prompts_of(tiny_model, [f"p{number}" for number in range(8)])
    pool = pool_of(cluster, tiny_model)
    from steersman.v1 import common_pb2

    sampling = common_pb2.SamplingParams(max_new_tokens=6, seed=5)
    ids = [prompt.ids for prompt in prompts]
    whole = {(one.prompt_index, one.sample_index): one.token_ids.tolist() for one in pool.generate(ids, 2, sampling)}
    cluster.loop.run(cluster.servers[0].drain())
    alone = {(one.prompt_index, one.sample_index): one.token_ids.tolist() for one in pool.generate(ids, 2, sampling)}
    assert alone == whole
    cluster.loop.run(cluster.servers[1].drain())
    with pytest.raises(UnavailableError, match="not ready after 5 s"):
        list(pool.generate(ids, 2, sampling))
    pool.close()
    cluster.servers.clear()


@contextmanager
def reference_service(lengths: int | None) -> Iterator[ReferenceClient]:
    """Fails every call, or gives rows of another length."""
    from steersman.rpc.wire import pack_rows
    from steersman.v1 import reference_pb2

    class Servicer(reference_pb2_grpc.ReferenceServiceServicer):
        def ComputeLogprobs(self, request: Any, context: Any) -> Any:
            if lengths is None:
                context.abort(grpc.StatusCode.INTERNAL, "broken")
            rows = [np.zeros(lengths, np.float32) for _ in request.prompt_lengths]
            return reference_pb2.ComputeLogprobsResponse(logprobs=pack_rows(rows, np.float32))

    server = grpc.server(ThreadPoolExecutor(2))
    reference_pb2_grpc.add_ReferenceServiceServicer_to_server(Servicer(), server)
    ready = health.HealthServicer()
    ready.set("steersman.v1.ReferenceService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(ready, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = ReferenceClient(f"127.0.0.1:{port}", "", 5.0, silent)
    try:
        yield client
    finally:
        client.close()
        server.stop(0)


def test_a_reference_that_fails_leaves_log_probabilities_missing() -> None:
    rows = [(np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32))]
    with reference_service(None) as client:
        (missing,) = calls().run(client.logprobs(rows, 1.0))
    assert np.isnan(missing).tolist() == [True, True]
    with reference_service(3) as client, pytest.raises(Exception, match="of other lengths than the answers"):
        calls().run(client.logprobs(rows, 1.0))


def test_what_is_not_finite_is_left_out_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from test_ppo_update import build, make_batch, options_of

    batch = make_batch(build(tiny_model, tmp_path, **options_of("grpo")).model)
    first = batch.lengths.cumsum(0) - batch.lengths
    engine, reference, scored = batch.engine_logprobs.clone(), batch.ref_logprobs.clone(), batch.scores.clone()
    engine[first[0]], reference[first[3]], scored[5] = -math.inf, math.nan, math.nan
    broken = replace(batch, engine_logprobs=engine, ref_logprobs=reference, scores=scored)
    kept, counts = exclude_failed(broken, [], 0.25)
    assert counts == {"failed": 3.0, "empty": 0.0}
    assert len(kept) == len(batch) - 3
    assert bool(kept.finite().all())
    with pytest.raises(FailedPreconditionError, match=r"3 of 12 samples .*log-probabilities .* not finite.*run pauses"):
        exclude_failed(broken, [], 0.2)


def test_prompts_beyond_the_reward_model_are_found_before_anything_is_sampled(
    cluster: Any, tiny_model: Path, run_manifest: Any, tmp_path: Path
) -> None:
    """Its maximum is that of its training; the policy's context would hold more."""
    from known_reward import write_reward_model

    from steersman.errors import DataError
    from steersman.nn.reward import read_settings, write_settings

    folder = write_reward_model(tmp_path / "reward", [{"C": 1.0}], "mean", "p0")
    settings = read_settings(folder)
    write_settings(folder, settings.model_copy(update={"max_length": 60}))
    cluster.start_policy(tiny_model)
    cluster.start_reference(tiny_model)
    cluster.start_reward([{"name": "preference", "kind": "model", "path": str(folder)}])
    stage = {"rl": {"algorithm": "rloo", "steps": 1, "promptsPerStep": 2, "generation": {"maxNewTokens": 2}}}
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: .* reward model preference, which takes 60 .*maxLength"):
        run_manifest(cluster, tiny_model, stage, prompts=["p0", "p" * 60])
