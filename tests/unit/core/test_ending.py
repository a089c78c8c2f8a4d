"""A thread that waits for ever does not keep a service from ending."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SERVICE = """
import asyncio, concurrent.futures, threading
from steersman.errors import ConfigError
from steersman.rpc import app

app.END_SECONDS = 0.2
never = threading.Event()
pool = concurrent.futures.ThreadPoolExecutor(1)

async def serve(config):
    {hang}
    {end}

app.service_main("policy", app.ServerConfig, serve)
"""
_HANGS = {
    "of the loop": "asyncio.get_running_loop().run_in_executor(None, never.wait)",
    "of a pool": "pool.submit(never.wait)",
}


@pytest.mark.parametrize("hang", list(_HANGS))
def test_a_service_ends_although_a_thread_waits_for_ever(hang) -> None:
    command = [sys.executable, "-c", _SERVICE.format(hang=_HANGS[hang], end="return")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "a thread did not come to its end" in done.stderr


def test_its_error_is_said_all_the_same() -> None:
    command = [
        sys.executable,
        "-c",
        _SERVICE.format(hang=_HANGS["of the loop"], end='raise ConfigError("no; mend it")'),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "policy: no; mend it" in done.stderr
    assert "Traceback" not in done.stderr
