"""The stock `openai` client's embeddings: gateway and embedding service on real sockets, with a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import sqlalchemy as sa
import torch

from services.embedding.config import EmbeddingOptions
from services.embedding.servicer import EmbeddingServicer
from services.gateway.auth.keys import create_key
from services.gateway.server import Gateway
from services.gateway.store import Audit, KeyUse, open_store
from services.gateway.testing import gateway_config, running_gateway, until
from steersman.nn.load import load_causal_lm, load_tokenizer
from steersman.nn.render import text_ids
from steersman.rpc.server import Server, ServerConfig
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.testing.models import save_model_folder, tiny_llama, tiny_tokenizer
from steersman.v1.embedding_pb2_grpc import add_EmbeddingServiceServicer_to_server

TEXTS = ["the order is late", "it is", "a third text that is longer than the others"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("embedder"), tiny_llama(), tiny_tokenizer())


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[Any]:
    servicer = EmbeddingServicer(lambda: folder, EmbeddingOptions(), "cpu")
    name = "steersman.v1.EmbeddingService"
    server = Server(ServerConfig(drain_seconds=0), [(0, [(add_EmbeddingServiceServicer_to_server, servicer, name)])])
    await server.start()
    await asyncio.to_thread(servicer.load)
    await server.ready()
    models = [{"name": "vectors", "endpoints": [f"127.0.0.1:{server.ports[0]}"]}]
    try:
        async with (
            serve_policy(FakePolicy()) as policy,
            running_gateway(gateway_config(policy, embeddings=models, **changes)) as gateway,
        ):
            yield gateway
    finally:
        await server.drain()
        await servicer.close()


def asking(gateway: Gateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def by_hand(folder: Path, text: str) -> np.ndarray:
    """The normalised mean of the trunk's last states over the text's tokens, one text at a time."""
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([text_ids(tokenizer, text)])).last_hidden_state[0]
    mean = hidden.mean(0).numpy()
    return mean / np.linalg.norm(mean)


async def test_texts_become_vectors(folder: Path) -> None:
    async with serving(folder) as gateway, asking(gateway) as client:
        # The client asks for base64 by itself.
        found = await client.embeddings.create(model="vectors", input=TEXTS)
        assert [item.index for item in found.data] == [0, 1, 2]
        tokenizer = load_tokenizer(folder)
        ids = [list(text_ids(tokenizer, text)) for text in TEXTS]
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
        for text, item in zip(TEXTS, found.data, strict=True):
            np.testing.assert_allclose(item.embedding, by_hand(folder, text), atol=1e-5)
        plain = await client.embeddings.create(model="vectors", input=TEXTS[1], encoding_format="float")
        np.testing.assert_allclose(plain.data[0].embedding, found.data[1].embedding, atol=1e-6)
        by_ids = await client.embeddings.create(model="vectors", input=ids)
        np.testing.assert_allclose(by_ids.data[2].embedding, found.data[2].embedding, atol=1e-6)
        short = await client.embeddings.create(model="vectors", input=TEXTS[0], dimensions=4)
        cut = np.array(found.data[0].embedding[:4])
        np.testing.assert_allclose(short.data[0].embedding, cut / np.linalg.norm(cut), atol=1e-6)
        assert [model.id async for model in client.models.list()] == ["steersman", "vectors"]

        with pytest.raises(openai.NotFoundError, match="'gpt' gives no embeddings here; use vectors"):
            await client.embeddings.create(model="gpt", input="x")
        for wrong, param in (
            ({"input": ""}, "input"),
            ({"input": []}, "input"),
            ({"input": [1, 999_999]}, "input"),
            ({"input": "x", "dimensions": 100_000}, "dimensions"),
            ({"input": "x", "dimensions": 5000}, "dimensions"),
            ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.embeddings.create(model="vectors", **wrong)  # type: ignore[arg-type]
            assert caught.value.param == param, wrong
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(model="vectors", input="long " * 4000)
        assert caught.value.code == "context_length_exceeded"


async def test_a_gateway_without_embeddings_says_so(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'steersman' gives no embeddings here") as caught:
        await client.embeddings.create(model="steersman", input="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_idempotency_quotas_and_audit(folder: Path, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    store = open_store(database)
    key = create_key(store, "acme", ["chat"], tokens_per_day=30)
    no_chat = create_key(store, "acme", ["feedback"])
    async with serving(folder, database=database, requireApiKey=True) as gateway:
        async with httpx.AsyncClient(base_url=f"{gateway.url}/v1", timeout=30) as http:

            async def ask(text: str, key: str = key, **headers: str) -> httpx.Response:
                body = {"model": "vectors", "input": text}
                return await http.post("/embeddings", json=body, headers={"authorization": f"Bearer {key}", **headers})

            assert (await ask("x", no_chat)).status_code == 403
            first = await ask("twelve chars", **{"idempotency-key": "k"})
            again = await ask("twelve chars", **{"idempotency-key": "k"})
            assert again.json() == first.json()
            assert (await ask("other", **{"idempotency-key": "k"})).status_code == 409
            statuses = [(await ask("twelve chars")).status_code for _ in range(4)]
            assert statuses[0] == 200
            assert statuses[-1] == 429
        await until(lambda: gateway.assistant.recorder.backlog == 0)
        with store.reading() as session:
            lines = session.execute(sa.select(Audit.action, Audit.outcome, Audit.prompt_tokens)).all()
            used = session.scalars(sa.select(KeyUse.tokens)).all()
    tokens = first.json()["usage"]["prompt_tokens"]
    assert lines[:2] == [("embed", "stop", tokens), ("replay", "stop", tokens)]
    assert sum(used) == tokens * sum(line[0] == "embed" and line[1] == "stop" for line in lines)
