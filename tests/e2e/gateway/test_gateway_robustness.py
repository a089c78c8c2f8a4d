"""Hostile requests, the exact OpenAPI document, SIGTERM under load, other engines, the Node client."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import Loaded
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from services.gateway.auth.keys import create_key
from services.gateway.store import open_store
from services.gateway.testing import free_port, gateway_config, running_gateway, serve_app, until, wait_for_port
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import common_pb2

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "steersman", "messages": [{"role": "user", "content": "hello there"}]}


# --- hostile requests -------------------------------------------------------------------------------------------


async def _exchange(port: int, data: bytes) -> bytes:
    """What comes back for raw bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(data)
        async with asyncio.timeout(20):
            while len(answer.partition(b"\r\n\r\n")[2]) <= 10 and (part := await reader.read(65536)):
                answer += part
    finally:
        writer.close()
    return answer


def _request(body: bytes, content_type: bytes = b"application/json", path: bytes = CHAT.encode()) -> bytes:
    head = b"POST " + path + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: " + content_type
    return head + b"\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body


NASTY = [
    b"GARBAGE\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    _request(b"[" * 100_000),
    _request(b'{"a":' * 50_000),
    _request(b'{"model": "steersman", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    _request(b'{"model": "steersman", "messages": [{"role": "user", "content": "\xff\xfe"}]}'),
    _request(b'{"model": "steersman", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}'),
    _request(b'{"model": "steersman", "seed": 1e400, "messages": [{"role": "user", "content": "x"}]}'),
    _request(b'{"model": "steersman", "max_tokens": ' + b"9" * 5000 + b"}"),
    _request(b"\x00" * 100),
    _request(b""),
    _request(b"a=b", b"text/plain"),
    _request(b"{}", b"application/json; charset=\xff"),
    _request(b"{}", path=b"/v1/../../etc/passwd"),
    _request(b"{}", path=b"/static/%2e%2e%2fapp.py"),
    _request(b"{}", path=b"/v2/models/%00/infer"),
    _request(b'{"inputs": [{"name": "text_input", "shape": [-1], "datatype": "BYTES", "data": [{}]}]}',
             path=b"/v2/models/steersman/infer"),
    _request(b'{"event_id": "a\\u0000", "answer_id": "b", "thumbs": "up"}', path=b"/v1/feedback"),
    _request(b"item_id=%ff", b"application/x-www-form-urlencoded", b"/label/1"),
    _request(b"item_id=1", b"application/x-www-form-urlencoded", b"/label/99999999999999999999999999"),
    _request(b"", path=b"/v1/actions/%00/confirm"),
]  # fmt: skip


async def test_nasty_requests_are_refused_with_a_sentence() -> None:
    async with serve_policy(FakePolicy()) as endpoint, running_gateway(gateway_config(endpoint)) as gateway:
        for data in NASTY:
            answer = await _exchange(gateway.port, data)
            status = int(answer.split(b" ", 2)[1])
            assert 400 <= status < 500, (data[:120], answer[:300])
            assert b"Traceback" not in answer
            assert len(answer.partition(b"\r\n\r\n")[2]) > 10
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            assert (await http.post(CHAT, json=BODY)).status_code == 200


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
_FIELDS = ["messages", "n", "stop", "seed", "temperature", "tools", "tool_choice", "response_format", "logprobs",
           "stream", "stream_options", "max_tokens", "conversation_id", "user", "metadata"]  # fmt: skip


async def test_fuzzed_bodies_never_make_a_server_error() -> None:
    async with (
        serve_policy(FakePolicy(keep_requests=False)) as endpoint,
        running_gateway(gateway_config(endpoint)) as gateway,
        httpx.AsyncClient(base_url=gateway.url) as http,
    ):
        loop = asyncio.get_running_loop()

        def send(path: str, content: bytes) -> httpx.Response:
            call = http.post(path, content=content, headers={"content-type": "application/json"})
            return asyncio.run_coroutine_threadsafe(call, loop).result(30)

        @settings(max_examples=150, deadline=None, database=None, derandomize=True)
        @given(st.sampled_from([CHAT, "/v1/completions", "/v1/feedback"]), st.sampled_from(_FIELDS), _json)
        def fuzz(path: str, name: str, value: Any) -> None:
            answer = send(path, json.dumps({**BODY, name: value}).encode())
            assert answer.status_code < 500, answer.text
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]

        @settings(max_examples=50, deadline=None, database=None, derandomize=True)
        @given(st.binary(max_size=200))
        def fuzz_bytes(content: bytes) -> None:
            assert 400 <= send(CHAT, content).status_code < 500

        await asyncio.to_thread(fuzz)
        await asyncio.to_thread(fuzz_bytes)


async def test_the_openapi_document_is_exact(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra `dev`)")
    database = f"sqlite:///{tmp_path}/g.db"
    key = create_key(open_store(database), "acme", ["chat", "feedback", "operate"])
    config = {"database": database, "requireApiKey": True}
    async with serve_policy(FakePolicy()) as endpoint, running_gateway(gateway_config(endpoint, **config)) as gateway:
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = [
            Path(sys.executable).parent / "schemathesis", "run", f"{gateway.url}/openapi.json",
            "--header", f"Authorization: Bearer {key}", "--checks", checks, "--phases", "examples,coverage,fuzzing",
            "--max-examples", "15", "--seed", "1", "--generation-database", "none",
        ]  # fmt: skip
        done = await asyncio.to_thread(
            subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=250
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# --- the end ----------------------------------------------------------------------------------------------------


async def test_sigterm_cuts_no_stream(repo_root: Path, loaded: Loaded) -> None:
    policy = FakePolicy(seconds_per_token=0.05, reply=lambda request: "word " * 40)
    port = free_port()
    async with serve_policy(policy) as endpoint:
        settings = [f"port={port}", "grpcPort=0", f"policy.endpoints=[{endpoint}]"]
        process = loaded.start(*(f"--set={setting}" for setting in settings), module="services.gateway", cwd=repo_root)
        try:
            await asyncio.to_thread(wait_for_port, port, process)
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as http:
                streams = [asyncio.create_task(http.post(CHAT, json={**BODY, "stream": True})) for _ in range(20)]
                await until(lambda: policy.running == 20, 30)
                process.send_signal(signal.SIGTERM)
                for stream in streams:
                    assert (await stream).text.endswith("data: [DONE]\n\n")
            assert await asyncio.to_thread(process.wait, 30) == 0
        finally:
            if process.poll() is None:
                process.kill()
    assert policy.cancelled == 0


async def test_a_system_that_never_answers_does_not_hold_the_end_up(
    repo_root: Path, tmp_path: Path, loaded: Loaded
) -> None:
    records, port = tmp_path / "records.json", free_port()
    records.write_text('{"order": []}')
    kind = {"entity": "order", "number": "number", "owner": "owner", "fields": {"number": "number"}}
    config = {
        "port": port,
        "grpcPort": 0,
        "drainSeconds": 1,
        "policy": {"endpoints": ["127.0.0.1:9"]},
        "identity": {"localCustomer": "C-A"},
        "tools": {"systems": [{"name": "shop", "type": "file", "path": str(records), "kinds": {"order": kind}}]},
    }
    path = tmp_path / "gateway.yaml"
    path.write_text(json.dumps(config))
    process = loaded.start("--config", str(path), module="services.gateway", cwd=repo_root)
    try:
        await asyncio.to_thread(wait_for_port, port, process)
        records.unlink()
        os.mkfifo(records)  # who reads it waits for ever
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            question = {**BODY, "messages": [{"role": "user", "content": "where is order 2?"}]}
            asked = asyncio.create_task(http.post(CHAT, json=question))
            await asyncio.sleep(1)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 60) == 0
            await asyncio.gather(asked, return_exceptions=True)
    finally:
        if process.poll() is None:
            process.kill()


# --- other engines ----------------------------------------------------------------------------------------------


async def test_an_openai_server_as_the_engine() -> None:
    """The gateway behind a gateway: the inner one plays vLLM."""
    policy = FakePolicy()
    async with serve_policy(policy) as endpoint, running_gateway(gateway_config(endpoint, model="inner")) as inner:
        engine = {"kind": "openai", "endpoints": [inner.url], "model": "inner"}
        async with (
            running_gateway(gateway_config(policy=engine)) as gateway,
            openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
        ):
            assert gateway.assistant.ready
            answer = await client.chat.completions.create(**BODY, n=2, logprobs=True, top_logprobs=2, stop=["zzz"])
            assert [c.message.content for c in answer.choices] == ["You said: hello there", "You said: hello there (1)"]
            assert answer.choices[0].logprobs.content[1].token == " said:"
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 9)
            text = await client.completions.create(model="steersman", prompt="one", logprobs=1)
            assert text.choices[0].text == " echo one"

            policy.reply = lambda request: [common_pb2.ToolCall(id="c", name="f", arguments='{"a": 1}')]
            tool = {"type": "function", "function": {"name": "f"}}
            called = await client.chat.completions.create(**BODY, tools=[tool])
            assert called.choices[0].message.tool_calls[0].function.arguments == '{"a": 1}'
            assert called.choices[0].finish_reason == "tool_calls"
            policy.fail_with = grpc.StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(**BODY)


def _tgi() -> Starlette:
    """The part of text-generation-inference's HTTP interface that its clients use (openapi of TGI 3)."""

    async def chat(request: Request) -> Response:
        body = await request.json()
        words = ["Served", " by", " TGI"][: body["max_tokens"]]

        async def events() -> AsyncIterator[str]:
            head = {
                "id": "",
                "created": 0,
                "model": "tgi",
                "system_fingerprint": "3",
                "object": "chat.completion.chunk",
            }
            for index, word in enumerate(words):
                finish = ("length" if len(words) < 3 else "stop") if index == len(words) - 1 else None
                token = {"token": word, "logprob": -0.5, "top_logprobs": []}
                choice = {
                    "index": 0,
                    "delta": {"role": "assistant", "content": word},
                    "logprobs": {"content": [token]},
                    "finish_reason": finish,
                }
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
            usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def generate(request: Request) -> Response:
        assert (await request.json())["stream"]

        async def events() -> AsyncIterator[str]:
            for index, word in enumerate((" once", " upon")):
                details = {"finish_reason": "eos_token", "generated_tokens": 2, "input_length": 3, "seed": 1}
                token = {"id": index, "text": word, "logprob": -0.25, "special": False}
                last = index == 1
                part = {"index": index, "token": token, "generated_text": " once upon" if last else None}
                yield f"data:{json.dumps({**part, 'details': details if last else None})}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def info(request: Request) -> Response:
        return JSONResponse({"model_id": "tiny", "max_total_tokens": 4096})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/generate_stream", generate, methods=["POST"]),
            Route("/", generate, methods=["POST"]),
            Route("/health", lambda request: Response(), methods=["GET"]),
            Route("/info", info, methods=["GET"]),
        ]
    )


async def test_text_generation_inference_as_the_engine() -> None:
    async with (
        serve_app(_tgi()) as url,
        running_gateway(gateway_config(policy={"kind": "tgi", "endpoints": [url]})) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert gateway.assistant.ready
        answer = await client.chat.completions.create(**BODY, logprobs=True)
        assert answer.choices[0].message.content == "Served by TGI"
        assert answer.choices[0].logprobs.content[0].logprob == -0.5
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 3)
        short = await client.chat.completions.create(**BODY, max_tokens=1)
        assert short.choices[0].finish_reason == "length"
        text = await client.completions.create(model="steersman", prompt="tell")
        assert (text.choices[0].text, text.choices[0].finish_reason) == (" once upon", "stop")


# --- Node -------------------------------------------------------------------------------------------------------

SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.GATEWAY + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "hello there" }];
const stream = await client.chat.completions.create({
  model: "steersman", messages, stream: true, stream_options: { include_usage: true },
});
let said = "", usage = null;
for await (const chunk of stream) {
  said += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const whole = await client.chat.completions.create({ model: "steersman", messages, n: 2 });
let refused = null;
try {
  await client.chat.completions.create({ model: "nothing", messages });
} catch (error) {
  refused = { status: error.status, code: error.code };
}
console.log(JSON.stringify({ said, usage, choices: whole.choices.length, refused }));
"""


async def test_the_node_client(repo_root: Path) -> None:
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("Node is not installed")
    folder = repo_root / ".cache" / "tests" / "node"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "openai").is_dir():
        command = ["npm", "install", "--no-audit", "--no-fund", "openai"]
        done = await asyncio.to_thread(subprocess.run, command, cwd=folder, capture_output=True, timeout=280)
        if done.returncode:
            pytest.skip("the npm package `openai` cannot be installed")
    (folder / "client.mjs").write_text(SCRIPT)
    async with serve_policy(FakePolicy()) as endpoint, running_gateway(gateway_config(endpoint)) as gateway:
        done = await asyncio.to_thread(
            subprocess.run,
            ["node", "client.mjs"],
            cwd=folder,
            env={**os.environ, "GATEWAY": gateway.url},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["said"] == "You said: hello there"
    assert found["usage"]["completion_tokens"] == 4
    assert found["choices"] == 2
    assert found["refused"] == {"status": 404, "code": "model_not_found"}
