"""vLLM's own OpenAI server behind the gateway (`make test-vllm`)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from services.gateway.server import Gateway
from services.gateway.testing import free_port, gateway_config, running_gateway, until, wait_for_port
from steersman.testing.models import save_model_folder, tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
BODY: dict[str, Any] = {
    "model": "steersman",
    "messages": [{"role": "user", "content": "hello there"}],
    "temperature": 0,
}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = os.environ.get("STEERSMAN_VLLM_PYTHON")
    if not python:
        pytest.skip("STEERSMAN_VLLM_PYTHON does not name the Python that has vLLM; `make test-vllm` sets it")
    folder: Path = tmp_path_factory.mktemp("vllm")
    # Heads of 32: vLLM has no CPU kernel for smaller ones.
    model, port = save_model_folder(folder / "model", tiny_llama(hidden_size=128)), free_port()
    # Not `vllm serve`: that looks for a package named vllm, and vLLM's build for CPUs has another name.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny"]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    options = ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8", "--dtype", "float32"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
    try:
        wait_for_port(port, process, 600)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
async def gateway(vllm_url: str) -> AsyncIterator[Gateway]:
    engine = {"kind": "openai", "endpoints": [vllm_url], "model": "tiny"}
    async with running_gateway(gateway_config(policy=engine)) as gateway:
        await until(lambda: gateway.assistant.ready, 60)
        yield gateway


async def test_an_answer_whole_and_streamed(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        several = await client.chat.completions.create(**{**BODY, "temperature": 1.0}, max_tokens=12, n=2)
        assert [choice.index for choice in several.choices] == [0, 1]
        whole = await client.chat.completions.create(**BODY, max_tokens=12, logprobs=True, top_logprobs=2)
        first = whole.choices[0]
        assert first.logprobs is not None
        assert first.logprobs.content is not None
        assert len(first.logprobs.content) <= 12
        assert all(token.logprob <= 0 and len(token.top_logprobs) >= 2 for token in first.logprobs.content)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(first.logprobs.content)

        parts, usage = [], None
        stream = await client.chat.completions.create(
            **BODY, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            parts.extend(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert "".join(parts) == first.message.content
        assert usage is not None
        assert usage.prompt_tokens == whole.usage.prompt_tokens

        text = await client.completions.create(model="steersman", prompt="once upon", max_tokens=4, temperature=0)
        assert text.usage is not None
        assert 1 <= text.usage.completion_tokens <= 4


async def test_constrained_decoding(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
        answer = await client.chat.completions.create(**BODY, max_tokens=100, response_format=schema)
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content or "")["ok"] in (True, False)


async def test_what_the_engine_refuses_is_the_callers_mistake(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        long = {**BODY, "messages": [{"role": "user", "content": "word " * 400}]}
        with pytest.raises(openai.BadRequestError, match="refuses"):
            await client.chat.completions.create(**long)


async def test_an_abandoned_stream_frees_the_engine(gateway: Gateway, vllm_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(**BODY, max_tokens=200, stream=True)
        async for _ in stream:
            break
        await stream.close()
        async with asyncio.timeout(30):
            while gateway.assistant.admission.running:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
