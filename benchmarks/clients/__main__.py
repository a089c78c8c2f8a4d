"""`make bench-clients`: stock clients, each in an environment of its own, make their calls to a real gateway.

    a policy and an embedding service with a tiny model -> gateway with a key -> client after client

The model's answers are known before (`guided.py`), so that every tool loop runs to its end.

Writes build/bench/clients.json: `works`, `refused_by_name` and `broken` are lists of 'client call'; `versions` says of
which packages. A call is refused by name where the client is told, in a sentence, which option it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.clients.guided import TEMPLATE, GuidedEngine
from benchmarks.report import command_line, write
from services.embedding.config import EmbeddingOptions
from services.embedding.servicer import EmbeddingServicer
from services.gateway.auth.keys import create_key
from services.gateway.store import open_store
from services.gateway.testing import gateway_config, running_gateway
from services.policy.build import load_chat_format
from services.policy.config import PolicyConfig
from services.policy.servicer import PolicyServicer
from steersman.nn.prepare import resolve_model
from steersman.rpc.server import Server, ServerConfig
from steersman.testing.models import save_model_folder, tiny_llama
from steersman.v1.embedding_pb2_grpc import add_EmbeddingServiceServicer_to_server
from steersman.v1.policy_pb2_grpc import add_PolicyServiceServicer_to_server

HERE = Path(__file__).parent
ENVIRONMENTS = Path("build/clients")
_CONTEXT = 2048
MODEL, EMBEDDING = "steersman", "vectors"
PYTHON = {
    "openai-python": ("openai_python.py", ["openai"]),
    "langchain": ("langchain_python.py", ["langchain-openai"]),
    "litellm": ("litellm_python.py", ["litellm"]),
    "pydantic-ai": ("pydantic_ai_python.py", ["pydantic-ai-slim[openai]"]),
    "llama-index": (
        "llama_index_python.py",
        ["llama-index-llms-openai-like", "llama-index-embeddings-openai-like"],
    ),
    "kserve": ("kserve_python.py", ["kserve"]),
}
NODE = {"openai-node": "openai", "vercel-ai": "ai"}
NODE_PACKAGES = ["openai", "ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"]
EXPECTED = {
    "openai-python": {"images": "content", "responses background": "background", "responses web search": "tools"}
}
"""Calls that this gateway cannot serve, and what the sentence must name."""


def python_environment(name: str, packages: list[str]) -> Path:
    """Its interpreter; made with the newest versions where it is not there."""
    folder = (ENVIRONMENTS / name).resolve()
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--upgrade", *packages], check=True)
        (folder / ".ready").touch()
    return python


def node_environment() -> Path:
    folder = (ENVIRONMENTS / "node").resolve()
    if not (folder / ".ready").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        install = ["npm", "install", "--no-audit", "--no-fund", *(f"{package}@latest" for package in NODE_PACKAGES)]
        subprocess.run(install, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (folder / ".ready").touch()
    return folder


def versions_of(name: str, packages: list[str]) -> dict[str, str]:
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    plain = [package.partition("[")[0] for package in packages]
    done = subprocess.run(
        [str(python_environment(name, packages)), "-c", code, *plain], check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


@asynccontextmanager
async def serving(model: Path) -> AsyncIterator[tuple[str, str, str]]:
    """URL, key and gRPC address of a gateway before a policy and an embedding service."""
    config = PolicyConfig(model=str(model))
    engine = GuidedEngine(model, max_context=_CONTEXT)
    chat = engine.chat = await asyncio.to_thread(load_chat_format, config)
    chat.tokenizer.chat_template = TEMPLATE
    vectors = EmbeddingServicer(lambda: model, EmbeddingOptions(), "cpu")
    server = Server(
        ServerConfig(drain_seconds=1),
        [
            (
                0,
                [
                    (add_PolicyServiceServicer_to_server, PolicyServicer(engine, chat), "steersman.v1.PolicyService"),
                    (add_EmbeddingServiceServicer_to_server, vectors, "steersman.v1.EmbeddingService"),
                ],
            )
        ],
    )
    await server.start()
    await asyncio.to_thread(engine.start)
    await asyncio.to_thread(vectors.load)
    await server.ready()
    address = f"127.0.0.1:{server.ports[0]}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            database = f"sqlite:///{scratch}/gateway.db"
            key = create_key(open_store(database), "bench", ["chat"])
            settings: dict[str, Any] = {
                "database": database,
                "requireApiKey": True,
                "defaults": {"maxTokens": 160, "temperature": 1.0},
                "embeddings": [{"name": EMBEDDING, "endpoints": [address]}],
            }
            async with running_gateway(gateway_config(address, **settings)) as gateway:
                yield gateway.url, key, f"127.0.0.1:{gateway.grpc_port}"
    finally:
        await server.drain()
        await vectors.close()
        await asyncio.to_thread(engine.close)


async def outcomes(command: list[str], cwd: Path | None = None) -> list[dict[str, str]]:
    """What a script of a client printed; one outcome `script` where it ended before its time."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    # No client is to look for news of itself, or of models' prices.
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "DO_NOT_TRACK": "1"}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 600)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    found = [json.loads(line[7:]) for line in out.decode().splitlines() if line.startswith("RESULT ")]
    if process.returncode or not found:
        found.append({"call": "script", "error": err.decode()[-600:]})
    return found


def sort_out(client: str, found: list[dict[str, str]], report: dict[str, Any]) -> None:
    for outcome in found:
        name = f"{client} {outcome['call']}"
        error, named = outcome.get("error"), EXPECTED.get(client, {}).get(outcome["call"])
        if error is None:
            report["works"].append(name)
        elif named and "400" in error and named in error:
            report["refused_by_name"].append(name)
        else:
            report["broken"].append(name)
            print(f"broken: {name}: {error}", file=sys.stderr)


async def measure(model: Path, only: list[str]) -> dict[str, Any]:
    report: dict[str, Any] = {"works": [], "refused_by_name": [], "broken": [], "versions": {}}
    async with serving(model) as (url, key, grpc):
        for client, (script, packages) in PYTHON.items():
            if only and client not in only:
                continue
            python = await asyncio.to_thread(python_environment, client, packages)
            report["versions"][client] = versions_of(client, packages)
            command = [str(python), str(HERE / script), url, MODEL, key, EMBEDDING, grpc]
            sort_out(client, await outcomes(command), report)
        for client, which in NODE.items():
            if only and client not in only:
                continue
            folder = await asyncio.to_thread(node_environment)
            script = folder / "node.mjs"
            script.write_text((HERE / "node.mjs").read_text())
            manifest = {
                name: json.loads((folder / f"node_modules/{name}/package.json").read_text()) for name in NODE_PACKAGES
            }
            report["versions"][client] = {name: manifest[name]["version"] for name in NODE_PACKAGES}
            command = ["node", str(script), which, url, MODEL, key, EMBEDDING]
            sort_out(client, await outcomes(command, folder), report)
    return report


def main() -> int:
    parser = command_line(__doc__, "clients")
    parser.add_argument("--model", help="folder, or the embedded default's name; without it a tiny random model")
    parser.add_argument("--only", nargs="*", default=[], help="these clients")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.model:
            model = resolve_model(arguments.model, PolicyConfig(model=arguments.model).cache_dir)
        else:
            tiny = tiny_llama()
            tiny.config.max_position_embeddings = _CONTEXT
            model = save_model_folder(Path(scratch), tiny)
        report = asyncio.run(measure(model, arguments.only))
    write(report, arguments.out)
    print(json.dumps({name: len(report[name]) for name in ("works", "refused_by_name", "broken")}))
    return 1 if report["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
