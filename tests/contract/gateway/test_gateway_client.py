"""`steersman.client` before a real gateway: answers, streams, feedback, what is refused; without torch."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.gateway.auth.keys import create_key
from services.gateway.store import open_store
from services.gateway.testing import gateway_config, running_gateway
from steersman.client import Answer, AsyncClient, Client
from steersman.errors import InvalidArgumentError, NotFoundError, UnauthenticatedError, UnavailableError
from steersman.store.models import FeedbackEvent
from steersman.testing.fake_policy import FakePolicy, serve_policy


async def test_it_asks_streams_and_judges() -> None:
    async with serve_policy(FakePolicy()) as endpoint, running_gateway(gateway_config(endpoint)) as gateway:
        async with AsyncClient(gateway.url) as client:
            assert await client.models() == ["steersman"]
            answer = await client.chat("hello", temperature=0)
            assert answer.text == "You said: hello"
            assert (answer.finish_reason, answer.sources, answer.proposed_actions) == ("stop", (), ())
            assert answer.feedback_token
            assert answer.completion_tokens > 0
            stream = await client.stream([{"role": "user", "content": "and now?"}])
            texts = [text async for text in stream]
            assert len(texts) > 1
            assert stream.answer.text == "".join(texts) == "You said: and now?"
            assert stream.answer.id != answer.id
            assert stream.answer.completion_tokens > 0
            assert await client.feedback(answer, thumbs="down", reason="too short", event_id="e1")
            assert not await client.feedback(answer, thumbs="down", reason="too short", event_id="e1")
            assert await client.feedback(stream.answer.id, edited_answer="Now it is.")
            with pytest.raises(NotFoundError):
                await client.feedback("nothing", thumbs="up")
            with pytest.raises(InvalidArgumentError, match="exactly one of thumbs"):
                await client.feedback(answer)
            with pytest.raises(InvalidArgumentError, match="temperature"):
                await client.chat("hello", temperature=9)
            with pytest.raises(NotFoundError):
                await client.confirm("nothing")
        with gateway.store.reading() as session:
            assert {event.kind for event in session.scalars(sa.select(FeedbackEvent))} == {"thumbs", "edit"}
        await asyncio.to_thread(blocking, gateway.url)


def blocking(url: str) -> None:
    with Client(url, model="steersman") as client:
        answer = client.chat("hello")
        assert isinstance(answer, Answer)
        stream = client.stream("again")
        assert "".join(stream) == stream.answer.text == "You said: again"
        assert client.feedback(stream.answer, thumbs="up")


async def test_what_is_refused_is_an_error_of_the_tree(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/g.db"
    key = create_key(open_store(database), "acme", ["chat"])
    async with (
        serve_policy(FakePolicy()) as endpoint,
        running_gateway(gateway_config(endpoint, database=database, requireApiKey=True)) as gateway,
    ):
        async with AsyncClient(gateway.url) as client:
            with pytest.raises(UnauthenticatedError, match="API key is needed"):
                await client.chat("hello")
        async with AsyncClient(gateway.url, api_key=key, model="nobody") as client:
            with pytest.raises(NotFoundError, match="nobody"):
                await client.chat("hello")
            with pytest.raises(NotFoundError):
                [text async for text in await client.stream("hello")]
    async with AsyncClient(gateway.url, model="m") as client:
        with pytest.raises(UnavailableError, match="ConnectError"):
            await client.chat("hello")


def test_it_imports_no_torch() -> None:
    program = "import sys, steersman.client; raise SystemExit('torch' in sys.modules or 'fastapi' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
