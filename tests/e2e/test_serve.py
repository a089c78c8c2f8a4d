"""`steersman serve` with real processes: taken ports, its own store, one Ctrl-C."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from loaded import STEERSMAN, Loaded

from steersman.local.process import free_ports
from steersman.testing.models import save_model_folder, tiny_llama

pytestmark = pytest.mark.timeout(600)


def test_taken_ports_feedback_that_stays_and_one_interrupt(tmp_path: Path, loaded: Loaded) -> None:
    save_model_folder(tmp_path / "model", tiny_llama())
    (port,) = free_ports(1)
    arguments = ["--port", str(port), "--grpc-port", str(port + 1), "--store", "kept.db"]
    with socket.create_server(("127.0.0.1", port)):
        serving = loaded.start("serve", "model", *arguments, cwd=tmp_path)
        try:
            told = ""
            while (found := re.search(r"chat page (http://127\.0\.0\.1:(\d+))/", told)) is None:
                told += (line := serving.stdout.readline())
                assert line, told
            # Both would have taken the port after the taken one.
            assert f"port {port} is taken" in told
            assert f"grpcPort {port + 1} is taken" in told
            assert f"sqlite:///{tmp_path}/kept.db" in told
            assert int(found.group(2)) > port
            question = {"messages": [{"role": "user", "content": "Hello"}], "model": "model", "max_tokens": 4}
            answer = httpx.post(f"{found.group(1)}/v1/chat/completions", json=question, timeout=60).json()
            judged = {"event_id": "one", "answer_id": answer["id"], "thumbs": "up"}
            assert httpx.post(f"{found.group(1)}/v1/feedback", json=judged, timeout=60).is_success
            assert "has no database" not in httpx.get(found.group(1), timeout=60).text
            serving.send_signal(signal.SIGINT)
            assert serving.wait(60) == 0
        finally:
            serving.kill()
    rest = serving.stdout.read()
    assert "stopping" in rest
    assert "is ready after" not in rest  # nothing was loaded again
    with sa.create_engine(f"sqlite:///{tmp_path}/kept.db").connect() as database:
        assert database.execute(sa.text("select count(*) from answers")).scalar() == 1


@pytest.mark.parametrize("port", ["0", "80000"])
def test_a_port_that_cannot_be_is_refused_in_words(port: str, tmp_path: Path) -> None:
    done = subprocess.run([STEERSMAN, "serve", ".", "--port", port], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "port" in done.stderr
