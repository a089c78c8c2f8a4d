"""SIGTERM: a loop ends its step and saves, everything else goes at once, and nobody stays longer than the limit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from steersman.leaving import EXIT_CODE

LOOP = """
import sys, time
from steersman import leaving
leaving.listen({limit})
with leaving.saves_between_steps():
    for step in range(1000):
        print("step", step, flush=True)
        time.sleep({pause})
        if leaving.asked():
            print("saved", flush=True)
            leaving.leave()
"""
LONG = """
import time
from steersman import leaving
leaving.listen()
try:
    print("step 0", flush=True)
    time.sleep(100)
finally:
    print("cleaned", flush=True)
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (LOOP.format(limit=20, pause=0.2), "saved"),
        (LOOP.format(limit=0.3, pause=100), "step 0"),
        (LONG, "cleaned"),
    ],
    ids=["saves", "gives-a-long-step-up", "leaves-at-once"],
)
def test_sigterm_is_obeyed(program, said):
    """As PID 1 too: a process that handles the signal is no exception there."""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "step 0" in process.stdout.readline()
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE == 143
    assert time.monotonic() - start < 30
    assert ["step 0", *rest.split()][-1] == said.split()[-1] or (not rest and said == "step 0")
