"""The threads of the engines that wait for others: one that is killed ends its requests, and the process is told."""

from __future__ import annotations

import asyncio
import queue
import threading
from pathlib import Path

import pytest
from engine_client import TIMEOUT, random_prompts

from services.policy.engine import Event, GenerationRequest, RequestFailed, SamplingParams
from services.policy.engines.tgi import TgiEngine
from services.policy.engines.vllm_engine import VllmEngine
from steersman.errors import InternalError, UnavailableError
from steersman.loop_thread import LoopThread

REQUEST = GenerationRequest("r", random_prompts([3, 4]), SamplingParams(max_new_tokens=2), n=2)


class Hanging:
    """What an engine's samples do where the other side says nothing."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    async def sample(self, *_: object) -> None:
        self.begun.set()
        await asyncio.Event().wait()


def tgi(folder: Path, died: threading.Event, monkeypatch: pytest.MonkeyPatch) -> TgiEngine:
    engine = TgiEngine("http://127.0.0.1:9", folder, on_death=died.set)
    engine._tokenizer, engine._context = range(300), 64
    monkeypatch.setattr(engine, "_text", lambda index, prompt: "text")
    return engine


def vllm(folder: Path, died: threading.Event, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    engine = VllmEngine(folder, on_death=died.set)
    engine._vocab, engine._context = 300, 64
    return engine


async def kill() -> None:
    raise SystemExit("killed")


@pytest.mark.parametrize("build", [tgi, vllm])
def test_a_thread_that_is_killed_ends_every_request_and_is_told(
    build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died, hanging = threading.Event(), Hanging()
    arrived: queue.Queue[Event] = queue.Queue()
    engine = build(tmp_path, died, monkeypatch)
    monkeypatch.setattr(engine, "_sample", hanging.sample)
    engine._loop = LoopThread("engine", engine._ended)
    engine.submit(REQUEST, arrived.put)
    assert hanging.begun.wait(TIMEOUT)
    engine._loop.begin(kill())
    event = arrived.get(timeout=TIMEOUT)
    assert isinstance(event, RequestFailed)
    assert isinstance(event.error, UnavailableError)
    assert "the engine has stopped" in event.error.message
    assert died.wait(TIMEOUT)
    with pytest.raises(UnavailableError):
        engine.submit(REQUEST, arrived.put)
    engine.cancel(1)
    engine._scratch = tmp_path / "scratch"
    engine.close()
    assert arrived.empty(), "told once"


@pytest.mark.parametrize("build", [tgi, vllm])
def test_a_request_that_cannot_be_begun_is_told(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: queue.Queue[Event] = queue.Queue()
    engine = build(tmp_path, threading.Event(), monkeypatch)

    def broken(*_: object) -> None:
        raise InternalError("no sample can be begun")

    monkeypatch.setattr(engine, "_sample", broken)
    engine._loop = LoopThread("engine", engine._ended)
    engine.submit(REQUEST, arrived.put)
    event = arrived.get(timeout=TIMEOUT)
    assert isinstance(event, RequestFailed)
    assert "no sample can be begun" in event.error.message
    engine._loop.close()
