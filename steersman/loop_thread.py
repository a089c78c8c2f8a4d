"""An event loop on a thread of its own, for work that other threads hand over.

    loop = LoopThread("services")
    loop.run(coroutine)       # its result, for a thread that waits
    loop.begin(coroutine)     # nobody waits
    loop.close()              # ends what still runs

The thread does not die unseen: what ends it from within (SystemExit out of a task) is told to `on_end`, everybody who
waits gets an error, and whoever comes later is refused.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError as Given
from concurrent.futures import Future
from typing import Any, TypeVar

from steersman.errors import UnavailableError

log = logging.getLogger("steersman.loop_thread")

T = TypeVar("T")


class LoopThread:
    def __init__(self, name: str, on_end: Callable[[BaseException | None], None] = lambda cause: None) -> None:
        """Args:
        name: of the thread.
        on_end: called from the thread when it ends, before what runs on it is cancelled; None: by `close`.
        """
        self._name = name
        self._on_end = on_end
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._open = True
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for the result; an interrupted caller cancels the work.

        Raises:
            UnavailableError: the loop is closed, or ended meanwhile.
        """
        future = self._handed_over(work)
        try:
            return future.result()
        except Given:
            if self._open:
                raise
            raise UnavailableError(f"{self._name} has stopped; try again") from None
        except BaseException:
            future.cancel()
            raise

    def begin(self, work: Coroutine[Any, Any, object], failed: Callable[[Exception], None] | None = None) -> None:
        """Returns at once; raises UnavailableError when the loop is closed.

        Args:
            failed: told what the work raised, from the thread.
        """

        def ended(future: Future[object]) -> None:
            error = None if future.cancelled() else future.exception()
            if isinstance(error, Exception):
                log.error("%s: work that nobody waits for failed", self._name, exc_info=error)
                if failed is not None:
                    failed(error)

        self._handed_over(work).add_done_callback(ended)

    def close(self) -> None:
        """Cancels what still runs, and waits until the thread has ended."""
        with self._lock:
            if self._open:
                self._open = False
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _handed_over(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._open:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise UnavailableError(f"{self._name} has stopped; try again")

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        cause: BaseException | None = None
        try:
            self._loop.run_forever()
        except BaseException as error:  # asyncio lets SystemExit and KeyboardInterrupt through, and keeps all else
            log.exception("the thread %s ended", self._name)
            cause = error
        with self._lock:
            self._open = False
        try:
            self._loop.run_until_complete(asyncio.sleep(0))  # what was handed over last has become a task
            self._on_end(cause)
        finally:
            self._end()

    def _end(self) -> None:
        while tasks := asyncio.all_tasks(self._loop):
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(tasks))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
