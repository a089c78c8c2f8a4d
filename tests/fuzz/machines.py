"""State machines under drawn commands, each beside a model of a few lines that says what must hold.

A function takes the commands of one life of the machine; what it raises besides its documented errors is a defect.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st

from steersman.errors import ConflictError, SteersmanError

_numbers = itertools.count()
_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")


def _few(*choices: st.SearchStrategy[Any], most: int = 12) -> st.SearchStrategy[Any]:
    return st.lists(st.one_of(*choices), min_size=1, max_size=most)


@cache
def _store() -> Any:
    from services.gateway.store import open_store

    return open_store(f"sqlite:///{_FOLDER.name}/machines.db")


# -- feedback: one current verdict of each judge, every event once ----------------------------------------------------


def feedback_commands() -> st.SearchStrategy[Any]:
    said = st.sampled_from([("thumbs", "up"), ("thumbs", "down"), ("outcome", "refund"), ("edit", "better")])
    return _few(st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 2), said))


def feedback(commands: list[tuple[int, int, int, tuple[str, str]]]) -> None:
    import sqlalchemy as sa

    from steersman.store.feedback import Event, Judge, save_answer, submit
    from steersman.store.models import Answer, FeedbackEvent

    life = next(_numbers)
    answers = [f"{life}-{number}" for number in range(2)]
    with _store().transaction() as session:
        for name in answers:
            save_answer(session, Answer(id=name, customer="t", prompt=[], answer="a"))
    events: dict[str, tuple[str, str, str, str]] = {}
    current: dict[tuple[str, ...], str] = {}
    for event, answer, judge, (kind, value) in commands:
        name, about = f"{life}-{event}", (answers[answer], kind, value)
        try:
            with _store().transaction() as session:
                new = submit(session, "t", Event(name, *about), Judge(id=f"j{judge}"))  # type: ignore[arg-type]
        except ConflictError:
            assert name in events
            assert events[name][:3] != about
            continue
        assert new == (name not in events)
        if new:
            events[name] = (*about, f"j{judge}")
            same = (*about[: 3 if kind == "outcome" else 2], f"j{judge}")
            current[same] = name
    with _store().reading() as session:
        rows = session.execute(
            sa.select(FeedbackEvent.event_id, FeedbackEvent.answer_id, FeedbackEvent.kind, FeedbackEvent.value,
                      FeedbackEvent.judge, FeedbackEvent.current).where(FeedbackEvent.answer_id.in_(answers))
        ).all()  # fmt: skip
    assert {row[0]: tuple(row[1:5]) for row in rows} == events
    assert len(rows) == len(events)
    assert sorted(row[0] for row in rows if row[5]) == sorted(current.values())


# -- idempotency: one request is carried out for a key, and everybody gets its result ---------------------------------


def idempotency_commands() -> st.SearchStrategy[Any]:
    key, body = st.integers(0, 1), st.integers(0, 1)
    rest = st.sampled_from(["end", "free", "lapse", "late"])
    return _few(st.tuples(st.just("claim"), key, body), st.tuples(rest, key, st.just(0)))


def idempotency(commands: list[tuple[str, int, int]]) -> None:

    from services.gateway.idempotency import Claim, IdempotencyKeys, end_claim
    from services.gateway.leases import Leases, moment
    from services.gateway.store import Idempotency

    life = next(_numbers)
    caller: Any = SimpleNamespace(tenant="t", customer_id=f"c{life}")
    keys = IdempotencyKeys(_store(), Leases(_store()))
    running: dict[int, tuple[Claim, int]] = {}
    lapsed: dict[int, Claim] = {}
    done: dict[int, tuple[int, dict[str, Any]]] = {}
    for what, key, body in commands:
        if what == "late":  # of two who worked for one key at most one ends
            if key in lapsed:
                with _store().transaction() as session:
                    taken_over = key in running or key in done
                    ended = end_claim(session, lapsed.pop(key), {"answer": "late"})
                    assert not (ended and taken_over), "a second answer"
        elif what == "claim":
            known = done[key][0] if key in done else running[key][1] if key in running else None
            try:
                got = asyncio.run(keys.claim(caller, "/r", f"k{key}", b"body %d" % body))
            except ConflictError:
                assert key in running or (known is not None and known != body)
                continue
            if isinstance(got, Claim):
                assert known is None, "carried out twice"
                running[key] = (got, body)
            else:
                assert done[key] == (body, got)
        elif key in running and what == "lapse":
            lapsed[key], _ = running.pop(key)
            with _store().transaction() as session:
                row = session.get_one(Idempotency, (lapsed[key].scope, lapsed[key].key))
                row.expires_at = moment(session, -dt.timedelta(seconds=1))
        elif key in running:
            claim, asked = running.pop(key)
            result = {"answer": life} if what == "end" else None
            with _store().transaction() as session:
                end_claim(session, claim, result)
                end_claim(session, Claim(claim.scope, claim.key, "another"), {"answer": "forged"})
            if result is not None:
                done[key] = (asked, result)


# -- admission: never more than there are places, nobody forgotten ----------------------------------------------------


def admission_commands() -> st.SearchStrategy[Any]:
    return _few(st.just(("enter", 0)), st.tuples(st.sampled_from(["leave", "cancel"]), st.integers(0, 7)), most=24)


def admission(commands: list[tuple[str, int]]) -> None:
    asyncio.run(_admission(commands))


async def _admission(commands: list[tuple[str, int]]) -> None:
    from services.gateway.admission import Admission
    from steersman.errors import RateLimitedError

    gate = Admission(2, 3, queue_seconds=60)
    inside: list[asyncio.Event] = []
    tasks: list[asyncio.Task[None]] = []
    waits: list[float] = []

    async def guest() -> None:
        leave = asyncio.Event()
        try:
            async with gate.place():
                inside.append(leave)
                assert len(inside) <= 2
                try:
                    await leave.wait()
                finally:
                    inside.remove(leave)
        except RateLimitedError as error:
            waits.append(error.retry_after)

    for what, number in commands:
        if what == "enter":
            tasks.append(asyncio.create_task(guest()))
        elif what == "leave" and inside:
            inside[number % len(inside)].set()
        elif what == "cancel" and tasks:
            tasks[number % len(tasks)].cancel()
        if number % 2 == 0:  # sometimes two things happen before anybody moves
            for _ in range(4):
                await asyncio.sleep(0)
            assert len(inside) == gate.running <= 2
            assert gate.waiting == 0 or gate.running == 2, "somebody waits before a free place"
    for _ in range(len(tasks) + 1):
        for leave in list(inside):
            leave.set()
        for _ in range(4):
            await asyncio.sleep(0)
    assert all(task.done() for task in tasks), "somebody is forgotten"
    assert (gate.running, gate.waiting) == (0, 0)
    assert all(1 <= seconds <= 60 for seconds in waits)
    for task in tasks:
        if not task.cancelled() and task.exception() is not None:
            raise task.exception()  # type: ignore[misc]


# -- weights: nothing but a whole upload with its digest is ever loaded -----------------------------------------------


@cache
def _payloads() -> list[bytes]:
    import torch
    from safetensors.torch import save

    return [save({"a": torch.full((3,), float(number))}) for number in range(3)]


def weights_commands() -> st.SearchStrategy[Any]:
    version, which = st.integers(0, 3), st.integers(0, 2)
    begin = st.tuples(st.just("begin"), version, which, st.sampled_from([0, 0, 0, 1]))
    chunk = st.tuples(st.just("chunk"), version, which, st.sampled_from(["rest", "rest", "half", "gap", "flip", "crc"]))
    rest = st.tuples(st.sampled_from(["commit", "commit", "abort"]), version, st.just(0), st.just(0))
    return _few(begin, chunk, rest)


def weights(commands: list[tuple[str, int, int, Any]]) -> None:
    asyncio.run(_weights(commands))


async def _weights(commands: list[tuple[str, int, int, Any]]) -> None:
    from isal import isal_zlib

    from services.policy.config import PolicyConfig
    from services.policy.weights import WeightsServicer
    from steersman.nn.serialize import digest_of
    from steersman.v1 import weights_pb2 as pb

    loads: list[tuple[int, float]] = []

    def load(update: Any) -> float:
        loads.append((update.version, float(update.tensors["a"][0])))
        return 0.0

    engine: Any = SimpleNamespace(
        info=lambda: SimpleNamespace(weights_version=loads[-1][0] if loads else 0), load_weights=load
    )
    servicer = WeightsServicer(engine, PolicyConfig(model="m"))
    sent, begun = bytearray(), None
    for what, version, which, how in commands:
        data = _payloads()[which]
        before = len(loads)
        with contextlib.suppress(SteersmanError):
            if what == "begin":
                digest = digest_of(data) if not how else "0" * 64
                manifest = pb.WeightsManifest(kind=pb.WEIGHTS_KIND_FULL, size=len(data), digest=digest)
                answer = await servicer.BeginUpdate(pb.BeginUpdateRequest(version=version, manifest=manifest), None)  # type: ignore[arg-type]
                if not answer.already_loaded:
                    sent, begun = bytearray(), (version, which, digest)
            elif what == "chunk":
                offset = len(sent) + (3 if how == "gap" else 0)
                part = bytearray(data[len(sent) : len(sent) + (len(data) // 2 if how == "half" else len(data))])
                crc = isal_zlib.crc32(part) ^ (how == "crc")
                if how == "flip" and part:
                    part[-1] ^= 1
                chunk = pb.UploadChunksRequest(version=version, offset=offset, data=bytes(part), crc32=crc)

                async def chunks(chunk: Any = chunk) -> Any:
                    yield chunk

                await servicer.UploadChunks(chunks(), None)  # type: ignore[arg-type]
                sent += part
            elif what == "commit":
                await servicer.CommitUpdate(pb.CommitUpdateRequest(version=version), None)  # type: ignore[arg-type]
                assert loads or not version, "a version is said to be loaded and none ever was"
            else:
                await servicer.AbortUpdate(pb.AbortUpdateRequest(version=version), None)  # type: ignore[arg-type]
        if len(loads) > before:
            assert what == "commit"
            assert begun is not None
            assert loads[-1] == (version, float(begun[1])), "what was loaded is not what was begun"
            assert version == begun[0]
            assert digest_of(bytes(sent)) == begun[2], "loaded without its digest"
    versions = [version for version, _ in loads]
    assert versions == sorted(set(versions)), "a version was loaded twice, or after a newer one"


# -- the operator: two controllers at once do what one does -----------------------------------------------------------


def operator_commands() -> st.SearchStrategy[Any]:
    happens = st.sampled_from(["both", "both", "first", "second", "up", "finish", "fail", "suspend", "resume", "later"])
    return st.lists(st.tuples(happens, st.integers(0, 2**16 - 1)), min_size=1, max_size=14)


def operator(commands: list[tuple[str, int]]) -> None:
    folder = str(Path(__file__).resolve().parents[1] / "unit" / "controller")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    asyncio.run(_operator(commands))


async def _operator(commands: list[tuple[str, int]]) -> None:
    from fake_kube import alignment_run
    from world import World

    from services.controller.reconcile import Reconciler

    world = World()
    world.kube.put(alignment_run())
    turns = _Turns(world.kube)
    both = [
        Reconciler(turns, world.settings, signals=None, registry=None, clock=lambda: world.now)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    for what, order in commands:
        stage = world.status().get("stage")
        job = f"demo-{stage}"
        there = world.kube.find("Job", job) is not None
        turns.order = order
        match what:
            case "both":
                await asyncio.gather(*(one.reconcile("ml", "demo") for one in both))
            case "first" | "second":
                await both[what == "second"].reconcile("ml", "demo")
            case "up":
                world.kube.services_up()
            case "finish" if there:
                world.kube.finish_job(job)
            case "fail" if there:
                world.kube.fail_pod(job, 2, "wrong", final=True)
            case "suspend" | "resume":
                await world.kube.patch("AlignmentRun", "ml", "demo", {"spec": {"suspend": what == "suspend"}})
            case "later":
                world.later(minutes=5)
        alive = [
            body["metadata"]["name"]
            for (kind, _, _), body in world.kube.objects.items()
            if kind == "Job" and not (body.get("status") or {}).get("conditions")
        ]
        assert len(alive) <= 1, f"two Jobs are alive: {alive}"
        phases = [one["phase"] for one in world.status().get("stages", ())]
        assert phases == sorted(phases, key=["Succeeded", "Running", "Failed", "Pending"].index), phases
    for _ in range(30):  # left alone they come to rest
        writes = len(world.kube.writes)
        await asyncio.gather(*(one.reconcile("ml", "demo") for one in both))
        if len(world.kube.writes) == writes:
            return
    raise AssertionError(f"two controllers never come to rest: {world.kube.writes[-6:]}")


class _Turns:
    """The cluster as two controllers see it: before a call one of them may have to let the other go first."""

    def __init__(self, kube: Any) -> None:
        self._kube = kube
        self.order = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kube, name)
        if not asyncio.iscoroutinefunction(found):
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            self.order, waits = self.order >> 1 | (self.order & 1) << 15, self.order & 1
            if waits:
                await asyncio.sleep(0)
            return await found(*arguments, **options)

        return call
