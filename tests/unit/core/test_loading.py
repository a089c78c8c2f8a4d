"""Whoever begins to load without collections ends so that there are some."""

from __future__ import annotations

import gc
import re
from pathlib import Path

from steersman import loading


def test_what_was_loaded_stays_and_what_comes_after_is_collected() -> None:
    loading.begin()
    assert not gc.isenabled()
    before = gc.get_freeze_count()
    kept = [[number] for number in range(1000)]
    loading.done()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)

    class Circle:
        alive = 0

        def __init__(self) -> None:
            self.me = self
            Circle.alive += 1

        def __del__(self) -> None:
            Circle.alive -= 1

    for _ in range(10):
        Circle()
    gc.collect()
    assert Circle.alive == 0


def test_every_process_that_begins_is_done_as_well(repo_root: Path) -> None:
    """Services begin in `service_main`; those on `Server.run` are done there, the controller in `serve`."""
    text = {name: (repo_root / name).read_text() for name in ("steersman/rpc/app.py", "steersman/rpc/server.py")}
    assert "loading.begin()" in text["steersman/rpc/app.py"]
    assert "loading.done()" in text["steersman/rpc/server.py"]
    for main in sorted(repo_root.glob("services/*/__main__.py")):
        code = main.read_text()
        if "service_main(" in code and not re.search(r"server\.run\(", code):
            module = re.search(r"from (services\S+) import serve", code)
            assert module is not None, main
            assert "loading.done()" in (repo_root / f"{module[1].replace('.', '/')}.py").read_text()
