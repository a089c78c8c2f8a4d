"""Knowledge through gateway and engine: the numbers of the model's folder, by our client and by the harness's."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.gateway.testing import gateway_config, running_gateway
from services.policy.chat import ChatFormat
from services.policy.engines.transformers_engine import TransformersEngine
from services.policy.servicer import PolicyServicer
from steersman.cli import app
from steersman.errors import ConfigError, SteersmanError
from steersman.knowledge import ask_knowledge, write_tasks
from steersman.nn.tokens import tokenizer_fingerprint
from steersman.rpc.server import Server, ServerConfig
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.testing.models import save_model_folder, tiny_llama, tiny_tokenizer
from steersman.v1 import policy_pb2_grpc

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `knowledge`)")
TASKS = ["truthfulqa_mc1", "truthfulqa_mc2", "mmlu_world_religions"]


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    rows = [
        ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"],
        ["A", "B", "Where is Köln?", "In Germany", "In Germany; In Europe", "In Spain; In Peru; Nowhere", "x"],
        ["A", "B", "What is two and two?", "Four", "Four", "Five, surely; Six", "x"],
    ]
    questions = [[f"Who is number {place}?", "Ann", "Bob", "Cid", "Dan", "ABCD"[place % 4]] for place in range(6)]
    for place, lines in {
        "truthfulqa/TruthfulQA.csv": rows,
        "mmlu/dev/world_religions_dev.csv": questions[:1],
        "mmlu/test/world_religions_test.csv": questions,
    }.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        with (folder / place).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)
    write_tasks(folder, TASKS, tmp_path / "tasks")
    return tmp_path / "tasks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama()
    model.config.max_position_embeddings = 2048  # the harness's examples are long in bytes
    return save_model_folder(tmp_path_factory.mktemp("known") / "model", model)


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[str]:
    """URL of a gateway before a policy service with the model."""
    tokenizer = tiny_tokenizer()
    engine = TransformersEngine(folder, precision="fp32", device="cpu")
    engine.start()
    servicer = PolicyServicer(engine, ChatFormat(tokenizer, tokenizer_fingerprint(tokenizer)))
    register = policy_pb2_grpc.add_PolicyServiceServicer_to_server
    server = Server(ServerConfig(drain_seconds=0), [(0, [(register, servicer, "steersman.v1.PolicyService")])])
    await server.start()
    await server.ready()
    try:
        async with running_gateway(gateway_config(f"127.0.0.1:{server.ports[0]}")) as gateway:
            yield f"{gateway.url}/v1"
    finally:
        await server.drain()
        engine.close()


async def test_an_endpoint_has_the_folders_numbers(folder: Path, task_files: Path) -> None:
    wanted = await asyncio.to_thread(ask_knowledge, str(folder), TASKS, task_files)
    assert {task: len(scores) for task, scores in wanted.items()} == dict(zip(TASKS, (2, 2, 6), strict=True))
    async with served(folder) as url:
        found = await asyncio.to_thread(ask_knowledge, url, TASKS, task_files, tokenizer=folder)
        for task in TASKS:
            assert found[task] == pytest.approx(wanted[task], abs=1e-4), task
        with pytest.raises(ConfigError, match="--tokenizer FOLDER, or ask only gsm8k"):
            await asyncio.to_thread(ask_knowledge, url, TASKS, task_files)


async def test_the_command_compares_a_folder_with_an_endpoint(folder: Path, task_files: Path, tmp_path: Path) -> None:
    async with served(folder) as url:
        command = ["eval", str(folder), url, "--knowledge", str(tmp_path / "data"), "--task", TASKS[2], "--json"]
        command += ["--tokenizer", str(folder), "--limit", "5", "--out", str(tmp_path / "out")]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert result.exit_code == 0, result.output
    own, other = json.loads(result.stdout.splitlines()[-1])["knowledge"][TASKS[2]].values()
    assert (own["questions"], own["score"]) == (other["questions"], other["score"])
    assert (other["questions"], other["difference"][0]) == (5, 0.0)
    kept = json.loads((tmp_path / "out" / "knowledge.json").read_text())
    assert len({tuple(scores[TASKS[2]]) for scores in kept["scores"].values()}) == 1


async def test_the_harness_own_client_has_the_folders_numbers(folder: Path, task_files: Path, tmp_path: Path) -> None:
    pytest.importorskip("tenacity", reason="the harness's client is not installed (lm-eval[api])")
    from lm_eval.tasks import TaskManager

    wanted = await asyncio.to_thread(ask_knowledge, str(folder), TASKS, task_files)
    async with served(folder) as url:
        arguments = f"model=steersman,base_url={url}/completions,tokenizer={folder},tokenizer_backend=huggingface"
        theirs = await asyncio.to_thread(
            lm_eval.simple_evaluate, model="local-completions", tasks=TASKS, batch_size=2, bootstrap_iters=0,
            model_args=f"{arguments},num_concurrent=2,max_length=2048",
            task_manager=TaskManager(include_path=str(task_files), include_defaults=False),
        )  # fmt: skip
    for task in TASKS:
        assert theirs["results"][task]["acc,none"] == pytest.approx(sum(wanted[task]) / len(wanted[task]), abs=1e-4), (
            task
        )


async def test_an_endpoint_without_prompts_log_probabilities_says_so(
    folder: Path, task_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_before = FakePolicy._answer

    def answer(self: FakePolicy, request: Any, context: Any) -> Any:
        request.prompt_logprobs = False  # as a service that does not know the field
        return of_before(self, request, context)

    monkeypatch.setattr(FakePolicy, "_answer", answer)
    async with serve_policy(FakePolicy()) as policy, running_gateway(gateway_config(policy)) as gateway:
        with pytest.raises(SteersmanError, match="there are no log-probabilities of this prompt"):
            await asyncio.to_thread(ask_knowledge, f"{gateway.url}/v1", TASKS[2:], task_files, tokenizer=folder)
