"""Services as child processes: start, restart, stop, and never outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from local_helpers import toy, until

from steersman.errors import UnavailableError
from steersman.local import process, supervisor
from steersman.local.supervisor import Supervisor


def serving(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="toy"), timeout=5)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def test_what_stays_the_same_keeps_running_and_the_rest_is_replaced(
    tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Supervisor(tmp_path / "services", environment, 60) as services:
        services.ensure([toy("a"), toy("b", version=1)])
        pids = {name: services.pid(name) for name in "ab"}
        assert serving(services.port("a"))
        assert serving(services.port("b"))
        services.ensure([toy("a"), toy("b", version=2)])
        assert services.pid("a") == pids["a"]
        assert services.pid("b") != pids["b"]
        assert not psutil.pid_exists(pids["b"])
        left = [services.pid("a"), services.pid("b")]
    assert not any(map(psutil.pid_exists, left))
    assert "services  a is ready after" in capsys.readouterr().out


def test_a_killed_service_comes_back_on_the_same_port(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    with Supervisor(tmp_path / "services", environment, 60) as services:
        services.ensure([toy()])
        before, port = services.pid("toy-0"), services.port("toy-0")
        os.kill(before, signal.SIGKILL)
        told: list[str] = []
        until(lambda: told.extend(services.tend()) or any("is ready" in line for line in told))
        assert told[0].startswith("toy-0 ended (killed by signal 9")
        assert services.pid("toy-0") != before
        assert services.port("toy-0") == port
        assert serving(port)


def test_a_service_that_crashes_again_and_again_ends_the_run(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor, "MAX_CRASHES", 3)
    crash = tmp_path / "crash"
    with Supervisor(tmp_path / "services", environment, 60) as services:
        services.ensure([toy(crash_file=str(crash))])
        crash.touch()
        os.kill(services.pid("toy-0"), signal.SIGKILL)
        with pytest.raises(UnavailableError, match="toy-0 crashed 3 times in a row \\(exit code 4\\)"):
            until(lambda: services.tend() and False)


def test_a_service_that_cannot_start_says_why(tmp_path: Path, environment: dict[str, str]) -> None:
    with (
        Supervisor(tmp_path / "services", environment, 60) as services,
        pytest.raises(UnavailableError, match="toy-0 could not be started \\(exit code 3\\): toy: no such model"),
    ):
        services.ensure([toy(refuse="no such model")])


def test_a_stubborn_process_is_killed(tmp_path: Path, environment: dict[str, str]) -> None:
    with Supervisor(tmp_path / "services", environment, 60) as services:
        services.ensure([toy(stubborn=True)])
        pid = services.pid("toy-0")
        process.stop([services._running["toy-0"].process], grace=0.1)
        assert not psutil.pid_exists(pid)


def test_nothing_survives_a_kill_of_the_parent(tmp_path: Path, environment: dict[str, str]) -> None:
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from steersman.local.supervisor import Service, Supervisor\n"
        "services = Supervisor(Path(sys.argv[1]), dict(os.environ), 60)\n"
        "services.ensure([Service('toy-0', 'toy_service', 'toy', {})])\n"
        "print('pid', services.pid('toy-0'), flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "services")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = next(int(line.split()[1]) for line in parent.stdout if line.startswith("pid"))
        assert psutil.pid_exists(pid)
        parent.kill()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_last_words_are_those_of_this_attempt(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("rl: an older reason\n")
    since = log.stat().st_size
    assert process.last_words(log, since) == "it left no message"
    with log.open("a") as file:
        file.write("Traceback\n\nrl: the reason\n\n")
    assert process.last_words(log, since) == "rl: the reason"


def test_ports_lie_below_those_of_outgoing_connections() -> None:
    ports = process.free_ports(3)
    assert len(set(ports)) == 3
    assert all(20_000 <= port < 32_000 and process.is_free(port) for port in ports)


def test_a_port_is_given_away_once(monkeypatch: pytest.MonkeyPatch) -> None:
    free = process.free_ports(2)
    monkeypatch.setattr("random.sample", lambda ports, count: free)
    assert process.free_ports(1, taken={free[0]}) == [free[1]]
