"""The contract of the policy and weights services, with vLLM as the engine (`make test-vllm`).

One service serves all tests, because vLLM takes long to start; so they run in this order and count versions up.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import test_model_services as contract
import torch
from live_services import Cluster, LoopThread

from steersman.nn.render import prompt_ids
from steersman.testing.models import CHAT_TEMPLATE, save_model_folder, tiny_llama, tiny_tokenizer
from steersman.v1 import common_pb2, policy_pb2_grpc
from steersman.v1 import policy_pb2 as pb

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


class _PatientLoop(LoopThread):
    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(600)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32: vLLM has no CPU kernel for smaller ones."""
    return save_model_folder(tmp_path_factory.mktemp("model"), tiny_llama(hidden_size=128))


@pytest.fixture(scope="module")
def stubs(model: Path) -> Iterator[contract.Stubs]:
    cluster = Cluster(_PatientLoop())
    cluster.start_policy(model, engine="vllm", kv_cache_tokens=8192, vllm={"eager": True, "max_running": 16})
    cluster.start_reference(model)
    cluster.start_reward([{"name": "regex", "kind": "verifiable", "options": {"pattern": "yes"}}])
    yield contract.Stubs(cluster.endpoints)
    cluster.close()


@pytest.mark.parametrize(
    "check",
    [
        contract.test_health_and_reflection,
        contract.test_samples_are_complete_and_repeatable,
        contract.test_reference_gives_the_log_probabilities_that_the_policy_sampled_with,
        contract.test_damaged_tensors_are_refused,
        contract.test_calls_are_counted_by_method_and_status,
        contract.test_cancellation_stops_the_work,
        contract.test_no_request_fails_during_a_swap,
        contract.test_weights_transaction,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_the_contract_holds(check: Callable[..., None], stubs: contract.Stubs, model: Path) -> None:
    arguments = {"stubs": stubs, "tiny_model": model}
    check(**{name: arguments[name] for name in inspect.signature(check).parameters})


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'


def taught(folder: Path) -> Path:
    """A model that answers one question with `CALL`, and nothing else."""
    template = "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}" + CHAT_TEMPLATE
    tokenizer, model = tiny_tokenizer(chat_template=template), tiny_llama(hidden_size=128).train()
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "Rome?"}], tools=[WEATHER])
    answer = tokenizer(CALL, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *answer]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if float(loss) < 1e-3:
            break
    return save_model_folder(folder, model.eval(), tokenizer)


def test_a_call_of_a_tool_is_read_as_with_the_other_engines(tmp_path: Path) -> None:
    cluster = Cluster(_PatientLoop())
    try:
        cluster.start_policy(
            taught(tmp_path / "taught"), engine="vllm", kv_cache_tokens=8192, vllm={"eager": True, "max_running": 16}
        )
        request = pb.PolicyServiceChatRequest(
            messages=[common_pb2.Message(role="user", content="Rome?")],
            tools_json=json.dumps([WEATHER]),
            sampling=common_pb2.SamplingParams(max_new_tokens=200, temperature=0.0),
        )
        with grpc.insecure_channel(cluster.endpoints["policy"][0]) as channel:
            got = list(policy_pb2_grpc.PolicyServiceStub(channel).Chat(request))
    finally:
        cluster.close()
    assert "".join(one.delta for one in got) == "Let me look."
    (call,) = got[-1].tool_calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
    assert got[-1].finish_reason == common_pb2.FINISH_REASON_TOOL_CALLS
