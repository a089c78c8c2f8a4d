"""Several models behind one gateway: names, fallbacks, weights, conversations that keep theirs, budgets, metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import sqlalchemy as sa

from services.gateway.auth.keys import create_key
from services.gateway.backends.models import weighted
from services.gateway.config import GatewayConfig
from services.gateway.server import Gateway
from services.gateway.store import KeyUse
from services.gateway.testing import gateway_config, running_gateway, until
from steersman.config.base import load_model
from steersman.errors import ConfigError
from steersman.store.models import Answer
from steersman.testing.fake_policy import FakePolicy, serve_policy
from steersman.v1 import chat_pb2, chat_pb2_grpc, common_pb2

CHAT = "/v1/chat/completions"
NAMES = ("main", "big", "small")


class Fleet:
    """A gateway before three models, each of which answers with its name."""

    def __init__(self, gateway: Gateway, http: httpx.AsyncClient, models: dict[str, FakePolicy]) -> None:
        self.gateway = gateway
        self.http = http
        self.models = models

    async def answer(self, model: str, text: str = "hello", **more: Any) -> tuple[str, str]:
        """Who says that he answered, and who did."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        said = await self.http.post(CHAT, json=body)
        assert said.status_code == 200, said.text
        return said.json()["model"], said.json()["choices"][0]["message"]["content"]


@asynccontextmanager
async def fleet(tmp_path: Path, **changes: Any) -> AsyncIterator[Fleet]:
    models = {name: FakePolicy(reply=lambda request, name=name: name, name=name) for name in NAMES}  # type: ignore[misc]
    async with AsyncExitStack() as stack:
        at = {name: await stack.enter_async_context(serve_policy(model)) for name, model in models.items()}

        def policy(name: str) -> dict[str, Any]:
            return {"endpoints": [at[name]], "probeSeconds": 0.1, "connectTimeoutSeconds": 5}

        settings: dict[str, Any] = {
            "model": "main",
            "modelAliases": ["gpt-4o"],
            "fallback": ["big", "small"],
            "database": f"sqlite:///{tmp_path}/gateway.db",
            "models": [
                {"name": "big", "aliases": ["org/big:70b"], "policy": policy("big"), "cost": 10},
                {"name": "small", "policy": policy("small"), "cost": 0.5},
            ],
            "routes": [{"name": "auto", "weights": {"big": 1, "small": 3}}],
        }
        config = gateway_config(at["main"], **{**settings, **changes})
        gateway = await stack.enter_async_context(running_gateway(config))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=gateway.url, timeout=60))
        yield Fleet(gateway, http, models)


async def test_every_model_answers_to_its_names_in_every_protocol(tmp_path: Path) -> None:
    async with fleet(tmp_path) as served:
        assert await served.answer("main") == ("main", "main")
        assert await served.answer("gpt-4o") == ("gpt-4o", "main")
        assert await served.answer("org/big:70b") == ("org/big:70b", "big")
        assert await served.answer("small") == ("small", "small")
        async with openai.AsyncOpenAI(base_url=f"{served.gateway.url}/v1", api_key="none", max_retries=0) as client:
            listed = [model.id async for model in client.models.list()]
            assert listed == ["main", "gpt-4o", "big", "org/big:70b", "small", "auto"]
            for name in listed:
                assert (await client.models.retrieve(name)).id == name
            with pytest.raises(openai.NotFoundError, match="The model 'huge' does not exist here; use 'main'"):
                await client.models.retrieve("huge")
            with pytest.raises(openai.NotFoundError, match="huge"):
                await client.responses.create(model="huge", input="hello")
            assert (await client.responses.create(model="small", input="hello")).output_text == "small"
            assert (await client.completions.create(model="big", prompt="hello")).choices[0].text == "big"
        tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hello"]}
        for name in ("big", "small"):
            inferred = (await served.http.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]})).json()
            assert inferred["model_name"] == name
            assert inferred["outputs"][0]["data"] == [name]
            generated = await served.http.post(f"/v2/models/{name}/generate", json={"text_input": "hello"})
            assert generated.json()["text_output"] == name
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.gateway.grpc_port}") as channel:
            stub = chat_pb2_grpc.ChatServiceStub(channel)
            asked = chat_pb2.ChatRequest(model="big", messages=[common_pb2.Message(role="user", content="hello")])
            assert "".join([part.delta async for part in stub.Chat(asked)]) == "big"
        with served.gateway.store.reading() as session:
            stored = session.execute(sa.select(Answer.model, Answer.deployment).distinct()).tuples().all()
        assert set(stored) == {
            ("main", ""), ("gpt-4o", ""), ("big", "big"), ("org/big:70b", "big"), ("small", "small")
        }  # fmt: skip


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_the_next_in_order_answers_for_one_that_cannot(tmp_path: Path, status: grpc.StatusCode) -> None:
    async with fleet(tmp_path) as served:
        served.models["main"].fail_with = status
        assert await served.answer("gpt-4o") == ("big", "big")
        served.models["big"].fail_with = status
        assert await served.answer("main") == ("small", "small")
        body = {"model": "main", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        streamed = (await served.http.post(CHAT, json=body)).text
        assert '"model":"small"' in streamed
        assert '"model":"main"' not in streamed
        served.models["main"].fail_with = None
        await until(lambda: served.gateway.pool.ready, 30)
        assert await served.answer("main") == ("main", "main")
        refused = await served.http.post(CHAT, json={**body, "model": "big", "stream": False})
        assert refused.status_code in (429, 503), "big has nobody who stands in"
        page = served.gateway.metrics.render().decode()
        assert 'steersman_gateway_model_stand_ins_total{by="big",model="main"}' in page
        assert 'steersman_gateway_model_answers_total{model="small",outcome="stop"} 2.0' in page
        with served.gateway.store.reading() as session:
            stored = session.execute(sa.select(Answer.model, Answer.deployment).distinct()).tuples().all()
        assert set(stored) == {("big", "big"), ("small", "small"), ("main", "")}


async def test_an_answer_that_has_begun_is_nobody_elses(tmp_path: Path) -> None:
    async with fleet(tmp_path) as served:
        served.models["main"].reply = lambda request: "one two three"
        served.models["main"].fail_after_tokens = 2
        body = {"model": "main", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        streamed = (await served.http.post(CHAT, json=body)).text
        assert "went away" in streamed
        assert "big" not in streamed


async def test_a_gateway_is_ready_while_one_model_can_answer(tmp_path: Path) -> None:
    nobody = {"endpoints": ["127.0.0.1:9"], "probeSeconds": 0.1, "connectTimeoutSeconds": 1}
    models = [{"name": "gone", "policy": nobody}, {"name": "shadow", "policy": nobody, "fallback": ["main"]}]
    async with fleet(tmp_path, models=models, fallback=[], routes=[]) as served:
        await until(lambda: served.gateway.assistant.ready, 30)
        shown = (await served.http.get("/readyz")).json()
        assert shown["models"] == {"main": True, "gpt-4o": True, "gone": False, "shadow": True}
        assert shown["replicas"]["gone 127.0.0.1:9"] is False
        assert (await served.http.get("/v2/models/main/ready")).json()["ready"] is True
        assert (await served.http.get("/v2/models/gone/ready")).status_code == 503
        assert await served.answer("shadow") == ("main", "main")
        body = {"model": "gone", "messages": [{"role": "user", "content": "hello"}]}
        assert (await served.http.post(CHAT, json=body)).status_code == 503


async def test_conversations_are_shared_by_weight_and_keep_their_model(tmp_path: Path) -> None:
    async with fleet(tmp_path) as served:
        asked = {f"question {number}": (await served.answer("auto", f"question {number}"))[1] for number in range(24)}
        expected = {text: weighted({"big": 1, "small": 3}, f"default\n\n{text}") for text in asked}
        assert asked == expected
        assert set(asked.values()) == {"big", "small"}
        kept = {name: await served.answer("auto", conversation_id=name) for name in map(str, range(6))}
        other = next(name for name, (model, _) in kept.items() if model == "small")
        served.models["small"].fail_with = grpc.StatusCode.UNAVAILABLE
        assert await served.answer("auto", conversation_id=other) == ("big", "big"), "the rest of a route stands in"
        served.models["small"].fail_with = None
        await until(lambda: served.gateway.models.can_answer("small"), 30)
    turned = [{"name": "auto", "weights": {"big": 1000, "small": 0.001}}]
    async with fleet(tmp_path, routes=turned) as served:
        again = {name: await served.answer("auto", conversation_id=name) for name in kept}
        assert again == kept, "other weights move no conversation that has begun"


def test_weights_are_shares_and_move_no_conversation_between_others() -> None:
    keys = [f"conversation {number}" for number in range(4000)]
    before = {key: weighted({"a": 1, "b": 3}, key) for key in keys}
    share = sum(name == "b" for name in before.values()) / len(keys)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / len(keys)) ** 0.5
    after = {key: weighted({"a": 1, "b": 3, "c": 4}, key) for key in keys}
    moved = {key for key in keys if after[key] != before[key]}
    assert {after[key] for key in moved} == {"c"}
    assert abs(len(moved) / len(keys) - 0.5) < 4 * (0.25 / len(keys)) ** 0.5


async def test_a_dearer_models_tokens_count_more(tmp_path: Path) -> None:
    async with fleet(tmp_path, requireApiKey=True, fallback=[]) as served:
        key = create_key(served.gateway.store, "acme", ["chat"], tokens_per_day=45)
        served.http.headers["authorization"] = f"Bearer {key}"
        assert await served.answer("small", "one two three", max_tokens=1) == ("small", "small")
        assert await served.answer("big", "one two three", max_tokens=1) == ("big", "big")

        def used() -> int:
            with served.gateway.store.reading() as session:
                return session.scalar(sa.select(sa.func.sum(KeyUse.tokens))) or 0

        assert used() == 2 + 40, "half of four tokens, and ten times four"
        assert await served.answer("small", "one two three", max_tokens=1) == ("small", "small")
        assert await served.answer("small", "one two three", max_tokens=1) == ("small", "small")
        body = {"model": "small", "messages": [{"role": "user", "content": "more"}], "max_tokens": 1}
        refused = await served.http.post(CHAT, json=body)
        assert refused.status_code == 429
        assert "45 tokens a day" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"models": [{"name": "steersman", "policy": {}}]}, "'steersman' is given twice"),
        ({"modelAliases": ["a", "a"]}, "'a' is given twice"),
        (
            {"models": [{"name": "b", "policy": {}}], "routes": [{"name": "b", "weights": {"b": 1}}]},
            "'b' is given twice",
        ),
        ({"fallback": ["nobody"]}, "fallback names 'nobody'; choose from further models"),
        ({"fallback": ["steersman"]}, "fallback names 'steersman'"),
        (
            {"models": [{"name": "b", "policy": {}, "fallback": ["c"]}]},
            "models.b.fallback names 'c'; choose from steersman",
        ),
        ({"routes": [{"name": "r", "weights": {"c": 1}}]}, "routes.r.weights names 'c'; choose from steersman"),
        ({"routes": [{"name": "r", "weights": {"steersman": 0}}]}, "weights"),
        ({"models": [{"name": "b"}]}, "policy"),
    ],
)
def test_names_that_lead_nowhere_are_refused_at_the_start(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_model(GatewayConfig, changes, "test")
    assert sentence in str(refused.value)
