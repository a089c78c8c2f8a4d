"""What threads hand to an engine's arrives once, whatever the order; nobody waits for an engine that has ended."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from services.policy.engines.intake import Intake, Swap
from steersman.errors import InternalError, UnavailableError

PATIENCE = 60


@dataclass(eq=False)
class One:
    handle: int = 0


def opened() -> Intake[One]:
    intake: Intake[One] = Intake()
    intake.open()
    return intake


def test_the_samples_of_a_request_have_its_handle_and_arrive_once() -> None:
    intake, first, second = opened(), [One(), One()], [One()]
    assert (intake.submit(first), intake.submit(second)) == (1, 2)
    assert [one.handle for one in first + second] == [1, 1, 2]
    intake.cancel(1)
    assert intake.waiting == 3
    taken = intake.take(busy=False)
    assert (taken.samples, taken.cancelled, taken.swaps, taken.open) == (first + second, {1}, [], True)
    empty = intake.take(busy=True)
    assert (empty.samples, empty.cancelled, intake.waiting) == ([], set(), 0)


def test_an_idle_engine_waits_for_samples_cancellations_weights_or_its_end() -> None:
    intake = opened()
    with ThreadPoolExecutor(2) as threads:
        for hand_over in (lambda: intake.submit([One()]), lambda: intake.cancel(7), intake.close):
            waiting = threads.submit(intake.take, False)
            hand_over()
            assert waiting.result(PATIENCE)
    assert not intake.take(busy=False).open


def test_weights_are_waited_for_and_what_failed_is_raised() -> None:
    intake = opened()
    for error in (None, InternalError("they do not fit")):
        swap = Swap(1, lambda: "old")
        with ThreadPoolExecutor(1) as caller:
            loading = caller.submit(intake.swap, swap)
            (taken,) = intake.take(busy=False).swaps
            assert not loading.done()
            taken.replaced = taken.place()
            taken.end(error)
            if error is None:
                loading.result(PATIENCE)
                assert swap.replaced is None, "freed by who waited"
            else:
                with pytest.raises(InternalError, match="do not fit"):
                    loading.result(PATIENCE)


def test_an_end_gives_back_what_came_too_late_and_refuses_what_comes_after() -> None:
    intake, late = opened(), One()
    intake.submit([late])
    swap, done = Swap(1, lambda: None), threading.Event()

    def load() -> None:
        with pytest.raises(UnavailableError, match="has stopped"):
            intake.swap(swap)
        done.set()

    threading.Thread(target=load, daemon=True).start()
    while not intake._swaps:
        pass
    left = intake.end()
    assert (left.samples, left.open) == ([late], True)
    left.swaps[0].end(UnavailableError("the engine has stopped"))
    assert done.wait(PATIENCE)
    assert not intake.end().open
    with pytest.raises(UnavailableError, match="send the request to another replica"):
        intake.submit([One()])
    with pytest.raises(UnavailableError, match="start it before loading weights"):
        intake.swap(Swap(2, lambda: None))
