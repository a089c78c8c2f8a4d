"""Policy, weights, reward and reference services over the wire, as any client sees them."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import grpc
import numpy as np
import pytest
import torch
from blake3 import blake3
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from safetensors.torch import save

from steersman.rpc.wire import pack_rows, unpack_rows
from steersman.v1 import (
    common_pb2,
    policy_pb2,
    policy_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    weights_pb2,
    weights_pb2_grpc,
)

PROMPTS = [np.arange(4, 12, dtype=np.int32), np.arange(30, 33, dtype=np.int32)]


class Stubs:
    def __init__(self, endpoints: dict[str, list[str]]) -> None:
        self.channels = {kind: grpc.insecure_channel(targets[0]) for kind, targets in endpoints.items()}
        self.policy = policy_pb2_grpc.PolicyServiceStub(self.channels["policy"])
        self.weights = weights_pb2_grpc.WeightsServiceStub(self.channels["weights"])
        self.reward = reward_pb2_grpc.RewardServiceStub(self.channels["reward"])
        self.reference = reference_pb2_grpc.ReferenceServiceStub(self.channels["reference"])


@pytest.fixture
def stubs(cluster: Any, tiny_model: Path) -> Stubs:
    cluster.start_policy(tiny_model)
    cluster.start_reference(tiny_model)
    cluster.start_reward([{"name": "regex", "kind": "verifiable", "weight": 2.0, "options": {"pattern": "yes"}}])
    return Stubs(cluster.endpoints)


def generate(stubs: Stubs, prompts: list[np.ndarray] = PROMPTS, n: int = 2, **fields: Any) -> list:
    sampling = common_pb2.SamplingParams(max_new_tokens=fields.pop("max_new_tokens", 6), seed=5)
    request = policy_pb2.GenerateRequest(prompts=pack_rows(prompts), n=n, sampling=sampling, **fields)
    return list(stubs.policy.Generate(request, timeout=30))


def error_of(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:  # noqa: PT012
        result = call()
        if isinstance(result, Iterator):
            list(result)
    return caught.value


def full_payload(stubs: Stubs, tiny_model: Path, scale: float) -> bytes:
    from safetensors.torch import load_file

    weights = load_file(tiny_model / "model.safetensors")
    return save({name: tensor * scale if "layers" in name else tensor for name, tensor in weights.items()})


def manifest_of(data: bytes, **fields: Any) -> weights_pb2.WeightsManifest:
    return weights_pb2.WeightsManifest(
        kind=weights_pb2.WEIGHTS_KIND_FULL, size=len(data), digest=blake3(data).hexdigest(), **fields
    )


def chunks(version: int, data: bytes, size: int = 10_000) -> Iterator[weights_pb2.UploadChunksRequest]:
    for offset in range(0, len(data), size):
        part = data[offset : offset + size]
        yield weights_pb2.UploadChunksRequest(version=version, offset=offset, data=part, crc32=zlib.crc32(part))


def publish(stubs: Stubs, version: int, data: bytes) -> None:
    stubs.weights.BeginUpdate(weights_pb2.BeginUpdateRequest(version=version, manifest=manifest_of(data)))
    stubs.weights.UploadChunks(chunks(version, data))
    stubs.weights.CommitUpdate(weights_pb2.CommitUpdateRequest(version=version))


def test_health_and_reflection(stubs: Stubs) -> None:
    names = {
        "policy": "steersman.v1.PolicyService",
        "weights": "steersman.v1.WeightsService",
        "reward": "steersman.v1.RewardService",
        "reference": "steersman.v1.ReferenceService",
    }
    for kind, name in names.items():
        channel = stubs.channels[kind]
        for service in ("", name):
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        listed = {service.name for service in response.list_services_response.service}
        assert name in listed
        # The control plane cannot be reached through the data plane's address.
        assert ("steersman.v1.WeightsService" in listed) == (kind == "weights")


def test_samples_are_complete_and_repeatable(stubs: Stubs) -> None:
    first, second = generate(stubs), generate(stubs)
    assert sorted((r.prompt_index, r.sample_index) for r in first) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for response in first:
        (tokens,) = unpack_rows(response.token_ids, np.int32, "token_ids")
        (logprobs,) = unpack_rows(response.logprobs, np.float32, "logprobs")
        assert len(tokens) == len(logprobs) <= 6
        assert (logprobs <= 0).all()
        assert list(response.weights_versions) == [0]
    assert [r.token_ids.data for r in first] == [r.token_ids.data for r in second]


def test_reference_gives_the_log_probabilities_that_the_policy_sampled_with(stubs: Stubs) -> None:
    for response in generate(stubs):
        prompt = PROMPTS[response.prompt_index]
        (tokens,) = unpack_rows(response.token_ids, np.int32, "token_ids")
        (sampled,) = unpack_rows(response.logprobs, np.float32, "logprobs")
        request = reference_pb2.ComputeLogprobsRequest(
            token_ids=pack_rows([np.concatenate([prompt, tokens])]), prompt_lengths=[len(prompt)]
        )
        (reference,) = unpack_rows(stubs.reference.ComputeLogprobs(request).logprobs, np.float32, "logprobs")
        np.testing.assert_allclose(reference, sampled, atol=1e-4)


def test_reference_batches_of_any_composition_agree(stubs: Stubs) -> None:
    rows = [np.arange(4, 20, dtype=np.int32), np.arange(4, 12, dtype=np.int32), np.arange(50, 53, dtype=np.int32)]
    lengths = [8, 8, 1]

    def ask(picked: list[int]) -> list[np.ndarray]:
        request = reference_pb2.ComputeLogprobsRequest(
            token_ids=pack_rows([rows[i] for i in picked]), prompt_lengths=[lengths[i] for i in picked], temperature=0.7
        )
        return unpack_rows(stubs.reference.ComputeLogprobs(request).logprobs, np.float32, "logprobs")

    together = ask([0, 1, 2])
    assert [len(row) for row in together] == [8, 0, 2]
    for index in range(3):
        np.testing.assert_allclose(ask([index])[0], together[index], atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "code", "sentence"),
    [
        (policy_pb2.GenerateRequest(), "INVALID_ARGUMENT", "prompts.dtype"),
        (policy_pb2.GenerateRequest(prompts=pack_rows(PROMPTS)), "INVALID_ARGUMENT", "max_new_tokens is 0"),
        (
            policy_pb2.GenerateRequest(
                prompts=pack_rows([np.arange(4, 9999)]), sampling=common_pb2.SamplingParams(max_new_tokens=1)
            ),
            "INVALID_ARGUMENT",
            "context",
        ),
        (
            policy_pb2.GenerateRequest(
                prompts=pack_rows(PROMPTS),
                sampling=common_pb2.SamplingParams(max_new_tokens=1),
                tokenizer_fingerprint="0" * 64,
            ),
            "FAILED_PRECONDITION",
            "tokenizer",
        ),
        (
            policy_pb2.GenerateRequest(
                prompts=pack_rows(PROMPTS), sampling=common_pb2.SamplingParams(max_new_tokens=1), weights_version=7
            ),
            "FAILED_PRECONDITION",
            "weights version 7",
        ),
    ],
)
def test_bad_generation_requests_get_a_sentence(stubs: Stubs, request_: Any, code: str, sentence: str) -> None:
    error = error_of(lambda: stubs.policy.Generate(request_))
    assert error.code().name == code
    assert sentence in error.details()
    (detail,) = rpc_status.from_call(error).details
    info = error_details_pb2.ErrorInfo()
    detail.Unpack(info)
    assert info.domain == "steersman.dev"


def test_damaged_tensors_are_refused(stubs: Stubs) -> None:
    good = pack_rows(PROMPTS)
    cut = common_pb2.RaggedTensor(dtype=good.dtype, lengths=good.lengths, data=good.data[:-4])
    flipped = common_pb2.RaggedTensor(
        dtype=good.dtype, lengths=good.lengths, data=b"\x05" + good.data[1:], crc32=good.crc32
    )
    for tensor, code in ((cut, "INVALID_ARGUMENT"), (flipped, "DATA_LOSS")):
        request = policy_pb2.GenerateRequest(prompts=tensor, sampling=common_pb2.SamplingParams(max_new_tokens=1))
        assert error_of(lambda request=request: stubs.policy.Generate(request)).code().name == code


def test_cancellation_stops_the_work(stubs: Stubs) -> None:
    sampling = common_pb2.SamplingParams(max_new_tokens=400, min_new_tokens=400)
    call = stubs.policy.Generate(policy_pb2.GenerateRequest(prompts=pack_rows(PROMPTS), n=8, sampling=sampling))
    deadline = time.monotonic() + 20
    while not stubs.policy.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest()).running and time.monotonic() < deadline:
        time.sleep(0.01)
    call.cancel()
    while time.monotonic() < deadline:
        info = stubs.policy.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest())
        if not info.running and not info.waiting:
            break
        time.sleep(0.01)
    assert info.running == info.waiting == 0


def test_a_deadline_ends_the_call(stubs: Stubs) -> None:
    sampling = common_pb2.SamplingParams(max_new_tokens=400, min_new_tokens=400)
    request = policy_pb2.GenerateRequest(prompts=pack_rows(PROMPTS), n=16, sampling=sampling)
    error = error_of(lambda: stubs.policy.Generate(request, timeout=0.05))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_chat_streams_text_with_stop_and_counts(stubs: Stubs) -> None:
    request = policy_pb2.PolicyServiceChatRequest(
        messages=[common_pb2.Message(role="user", content="hi")],
        sampling=common_pb2.SamplingParams(max_new_tokens=12, min_new_tokens=12, temperature=0),
    )
    responses = list(stubs.policy.Chat(request))
    text = "".join(response.delta for response in responses)
    assert responses[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert responses[-1].completion_tokens == 12
    visible = [character for character in text if character.isascii() and character.isprintable()]
    if visible:
        request.stop.append(visible[0])
        stopped = list(stubs.policy.Chat(request))
        assert "".join(response.delta for response in stopped) == text[: text.index(visible[0])]
        assert stopped[-1].finish_reason == common_pb2.FINISH_REASON_STOP


def test_chat_keeps_to_a_json_schema(stubs: Stubs) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    request = policy_pb2.PolicyServiceChatRequest(
        messages=[common_pb2.Message(role="user", content="hi")],
        sampling=common_pb2.SamplingParams(max_new_tokens=60, seed=1),
        json_schema=json.dumps(schema),
    )
    text = "".join(response.delta for response in stubs.policy.Chat(request))
    assert set(json.loads(text)) == {"ok"}


def test_weights_transaction(stubs: Stubs, tiny_model: Path) -> None:
    before = generate(stubs)
    publish(stubs, 3, full_payload(stubs, tiny_model, 1.5))
    status = stubs.weights.GetWeightsStatus(weights_pb2.GetWeightsStatusRequest())
    assert (status.loaded_version, status.pending_version) == (3, 0)
    after = generate(stubs, weights_version=3)
    assert [list(r.weights_versions) for r in after] == [[3]] * 4
    assert {r.logprobs.data for r in after} != {r.logprobs.data for r in before}


def test_weights_transaction_is_idempotent_and_ordered(stubs: Stubs, tiny_model: Path) -> None:
    data = full_payload(stubs, tiny_model, 1.1)
    publish(stubs, 2, data)
    again = weights_pb2.BeginUpdateRequest(version=2, manifest=manifest_of(data))
    assert stubs.weights.BeginUpdate(again).already_loaded
    assert stubs.weights.CommitUpdate(weights_pb2.CommitUpdateRequest(version=2)).version == 2
    older = weights_pb2.BeginUpdateRequest(version=1, manifest=manifest_of(data))
    assert error_of(lambda: stubs.weights.BeginUpdate(older)).code() == grpc.StatusCode.FAILED_PRECONDITION
    stubs.weights.BeginUpdate(weights_pb2.BeginUpdateRequest(version=3, manifest=manifest_of(data)))
    other = weights_pb2.BeginUpdateRequest(version=4, manifest=manifest_of(data))
    assert error_of(lambda: stubs.weights.BeginUpdate(other)).code() == grpc.StatusCode.ABORTED
    stubs.weights.AbortUpdate(weights_pb2.AbortUpdateRequest(version=3))
    stubs.weights.BeginUpdate(other)


def test_incomplete_or_damaged_weights_are_never_loaded(stubs: Stubs, tiny_model: Path) -> None:
    data = full_payload(stubs, tiny_model, 1.2)
    begin = weights_pb2.BeginUpdateRequest(version=1, manifest=manifest_of(data))
    commit = weights_pb2.CommitUpdateRequest(version=1)
    stubs.weights.BeginUpdate(begin)
    stubs.weights.UploadChunks(chunks(1, data[: len(data) // 2]))
    assert error_of(lambda: stubs.weights.CommitUpdate(commit)).code() == grpc.StatusCode.FAILED_PRECONDITION
    stubs.weights.BeginUpdate(begin)
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    stubs.weights.UploadChunks(chunks(1, damaged))
    assert error_of(lambda: stubs.weights.CommitUpdate(commit)).code() == grpc.StatusCode.DATA_LOSS
    bad = weights_pb2.UploadChunksRequest(version=1, offset=0, data=b"abc", crc32=1)
    stubs.weights.BeginUpdate(begin)
    assert error_of(lambda: stubs.weights.UploadChunks(iter([bad]))).code() == grpc.StatusCode.DATA_LOSS
    assert stubs.weights.GetWeightsStatus(weights_pb2.GetWeightsStatusRequest()).loaded_version == 0


def test_weights_are_read_from_allowed_places_only(cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    cluster.start_policy(tiny_model, artifact_urls=[f"file://{tmp_path}/shared/", "memory://bucket/"])
    cluster.endpoints |= {"reward": cluster.endpoints["policy"], "reference": cluster.endpoints["policy"]}
    stubs = Stubs(cluster.endpoints)
    data = full_payload(stubs, tiny_model, 1.3)
    (tmp_path / "shared").mkdir()
    for path in ("outside", "shared/weights"):
        (tmp_path / path).write_bytes(data)
    fsspec.filesystem("memory").pipe_file("/bucket/weights", data)

    def load(version: int, url: str, payload: bytes = data) -> int:
        manifest = manifest_of(payload, artifact_url=url)
        stubs.weights.BeginUpdate(weights_pb2.BeginUpdateRequest(version=version, manifest=manifest))
        return stubs.weights.CommitUpdate(weights_pb2.CommitUpdateRequest(version=version)).version

    outside = (f"file://{tmp_path}/outside", f"file://{tmp_path}/shared/../outside", "file:///etc/passwd")
    for url in outside:
        assert error_of(lambda url=url: load(1, url)).code() == grpc.StatusCode.PERMISSION_DENIED
    missing = error_of(lambda: load(1, f"file://{tmp_path}/shared/missing"))
    assert missing.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "missing cannot be read (No such file or directory); do trainer and replica see the same folder?" in (
        missing.details()
    )
    other = data[:-1] + bytes([data[-1] ^ 1])
    stubs.weights.AbortUpdate(weights_pb2.AbortUpdateRequest(version=1))
    assert error_of(lambda: load(2, f"file://{tmp_path}/shared/weights", other)).code() == grpc.StatusCode.DATA_LOSS
    stubs.weights.AbortUpdate(weights_pb2.AbortUpdateRequest(version=2))
    assert load(3, f"file://{tmp_path}/shared/weights") == 3
    shared = {response.logprobs.data for response in generate(stubs)}
    # The trainer's next weights go into the same file; what is served does not change with it.
    (tmp_path / "shared" / "weights").write_bytes(bytes(len(data)))
    assert {response.logprobs.data for response in generate(stubs)} == shared
    assert load(4, "memory://bucket/weights") == 4
    assert {response.logprobs.data for response in generate(stubs)} == shared


def test_no_request_fails_during_a_swap(stubs: Stubs, tiny_model: Path) -> None:
    sampling = common_pb2.SamplingParams(max_new_tokens=120, min_new_tokens=120, seed=1)
    call = stubs.policy.Generate(policy_pb2.GenerateRequest(prompts=pack_rows(PROMPTS), n=2, sampling=sampling))
    while not stubs.policy.GetPolicyInfo(policy_pb2.GetPolicyInfoRequest()).running:
        time.sleep(0.001)
    # What was asked later has its token: the others have begun, however busy the machine is.
    one = common_pb2.SamplingParams(max_new_tokens=1, seed=1)
    assert list(stubs.policy.Generate(policy_pb2.GenerateRequest(prompts=pack_rows(PROMPTS[:1]), n=1, sampling=one)))
    publish(stubs, 1, full_payload(stubs, tiny_model, 1.01))
    versions = [tuple(response.weights_versions) for response in call]
    assert len(versions) == 4
    assert all(version in ((0,), (0, 1)) for version in versions)


def conversation(answer: str) -> list[common_pb2.Message]:
    return [common_pb2.Message(role="user", content="?"), common_pb2.Message(role="assistant", content=answer)]


def test_reward_parts_are_weighted_and_failures_stay_apart(stubs: Stubs) -> None:
    items = [
        reward_pb2.ScoreItem(messages=conversation("yes")),
        reward_pb2.ScoreItem(messages=conversation("no")),
        reward_pb2.ScoreItem(token_ids=pack_rows([np.arange(4, 8)])),
    ]
    yes, no, tokens_only = stubs.reward.Score(reward_pb2.ScoreRequest(items=items)).scores
    assert (yes.reward, no.reward) == (2.0, 0.0)
    assert yes.parts[0].value == 1.0
    assert not tokens_only.HasField("reward")
    assert "messages" in tokens_only.error


def test_a_learned_reward_is_the_same_from_token_ids_and_messages(
    cluster: Any, tmp_path: Path, tiny_model: Path
) -> None:
    from steersman.nn.load import load_reward_model, load_tokenizer
    from steersman.nn.tokens import tokenizer_fingerprint
    from steersman.testing.models import tiny_llama_reward, tiny_tokenizer

    tiny_llama_reward().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    cluster.start_reward([{"name": "preference", "kind": "model", "path": str(tmp_path)}])
    stub = reward_pb2_grpc.RewardServiceStub(grpc.insecure_channel(cluster.endpoints["reward"][0]))
    model = load_reward_model(tmp_path)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    ids = model.encode(messages)
    wire = [common_pb2.Message(**message) for message in messages]
    fingerprint = tokenizer_fingerprint(load_tokenizer(tmp_path))
    items = [reward_pb2.ScoreItem(messages=wire), reward_pb2.ScoreItem(token_ids=pack_rows([np.array(ids)]))]
    scores = stub.Score(reward_pb2.ScoreRequest(items=items, tokenizer_fingerprint=fingerprint)).scores
    expected = model.score([ids]).reward.item()
    assert [score.reward for score in scores] == pytest.approx([expected, expected], abs=1e-5)
    assert torch.is_tensor(model.score([ids]).reward)


def test_the_server_drains(cluster: Any, tiny_model: Path) -> None:
    cluster.start_policy(tiny_model)
    channel = grpc.insecure_channel(cluster.endpoints["policy"][0])
    cluster.loop.run(cluster.servers.pop().drain())
    with pytest.raises(grpc.RpcError) as caught:
        policy_pb2_grpc.PolicyServiceStub(channel).GetPolicyInfo(policy_pb2.GetPolicyInfoRequest(), timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_calls_are_counted_by_method_and_status(stubs: Stubs) -> None:
    from prometheus_client import REGISTRY

    def count(code: str) -> float:
        labels = {"method": "/steersman.v1.PolicyService/Generate", "code": code}
        return REGISTRY.get_sample_value("steersman_requests_total", labels) or 0.0

    before = count("OK"), count("INVALID_ARGUMENT")
    tokens = REGISTRY.get_sample_value("steersman_generated_tokens_total") or 0.0
    samples = generate(stubs)
    error_of(lambda: stubs.policy.Generate(policy_pb2.GenerateRequest()))
    assert (count("OK"), count("INVALID_ARGUMENT")) == (before[0] + 1, before[1] + 1)
    made = sum(sum(sample.token_ids.lengths) for sample in samples)
    assert REGISTRY.get_sample_value("steersman_generated_tokens_total") == tokens + made
