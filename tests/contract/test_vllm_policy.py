"""The contract of the policy and weights services, with vLLM as the engine (`make test-vllm`).

One service serves all tests, because vLLM takes long to start; so they run in this order and count versions up.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_model_services as contract
from live_services import Cluster, LoopThread

from steersman.testing.models import save_model_folder, tiny_llama

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
