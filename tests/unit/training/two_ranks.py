"""Two ranks as processes of this machine, forked from one that has the libraries loaded already."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from training import RANKS_FILE

if multiprocessing.current_process().name == "MainProcess" and os.environ.get("STEERSMAN_TEST_RANKS"):
    # In the process that the ranks are forked from: what takes seconds to import, without using any of it.
    from steersman import loading
    from steersman.openmp import prefer_yielding_threads

    loading.begin()
    prefer_yielding_threads()
    import training.offline.dpo
    import training.offline.ilql
    import training.offline.reward_model
    import training.offline.sft
    import training.online.loop  # noqa: F401

    loading.done()


_PATIENCE = 600.0


def run_on_two_ranks(work: Callable[..., None], *arguments: Any, folder: Path, ends: int = 0) -> str:
    """What the ranks said; `ends`: the exit code of the first rank, a signal's number below zero.

    Args:
        work: a function of a module, given `arguments` on both ranks.
        folder: where the ranks meet.
    """
    meeting, log = folder / f"meeting-{time.monotonic_ns()}", folder / "ranks.log"
    log.write_bytes(b"")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    changed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "STEERSMAN_TEST_RANKS": "1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        ranks = [context.Process(target=_rank, args=(rank, meeting, log, work, arguments)) for rank in range(2)]
        for rank in ranks:
            rank.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    try:
        wait([rank.sentinel for rank in ranks])
        if ends < 0:
            ranks[1].kill()  # as torchrun does: who has lost another cannot go on
        for rank in ranks:
            rank.join(_PATIENCE)
    finally:
        for rank in ranks:
            rank.kill()
    said = log.read_text(errors="replace")
    assert ends < 0 or ranks[1].exitcode == ends, said[-3000:]
    assert ranks[0].exitcode == ends, said[-3000:]
    return said


def _rank(rank: int, meeting: Path, log: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ[RANKS_FILE] = str(meeting)
    work(*arguments)
