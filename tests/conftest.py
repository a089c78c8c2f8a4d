"""Fixtures that every suite shares."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from steersman import loading
from steersman.openmp import prefer_yielding_threads

# A shell's background job ignores SIGINT, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["STEERSMAN_TRACKING"] = "off"  # runs of the tests leave no database beside them; tests of tracking set it
prefer_yielding_threads()  # as services and stages do, before anything imports torch
loading.begin()

settings.register_profile("steersman", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("steersman")

pytest_plugins = ["live_services", "loaded", "made_once"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _arithmetic_as_it_was() -> Iterator[None]:
    """A stage that a test runs in this process may ask torch for deterministic kernels or threads of its own, which
    others do not want."""
    before = torch.get_num_threads() if (torch := sys.modules.get("torch")) else None
    yield
    if torch := sys.modules.get("torch"):
        torch.use_deterministic_algorithms(False)
        if before is not None and torch.get_num_threads() != before:
            torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _modules_are_no_garbage() -> None:
    """What is loaded stays, so that no collection looks at all of torch and of the tests again: that takes a second,
    and a trainer asks for several."""
    loading.done()


# Files run side by side, one a worker: those that take minutes begin first, so that none of them is alone at the end.
LONG_FIRST = ("tests/e2e/", "tests/unit/training/", "tests/contract/", "tests/unit/chart/", "tests/unit/controller/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        name = item.path.relative_to(ROOT).as_posix()
        return next((place for place, folder in enumerate(LONG_FIRST) if name.startswith(folder)), len(LONG_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real sample rows of public data sets; it lies beside a development checkout."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"real data samples are not at {path}")
    return path
