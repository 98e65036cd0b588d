"""Calls in the background that nobody has to wait for: the process may end while a server still owes an answer."""

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any


class DaemonPool:
    """What `ThreadPoolExecutor.submit` does, in daemon threads: those of the library are waited for when the process ends, by Ctrl-C too.

    Args:
        num_threads: calls at once, at most.
        name: of the threads.
    """

    def __init__(self, num_threads: int, name: str):
        self._num_left, self._name = num_threads, name
        self._calls: SimpleQueue[tuple[Future, Callable] | None] = SimpleQueue()
        self._idle = Semaphore(0)
        weakref.finalize(self, self._calls.put, None)

    def submit(self, function: Callable, *args, **kwargs) -> Future:
        """Call it soon. The future has what it returns or raises."""
        future: Future[Any] = Future()
        self._calls.put((future, partial(function, *args, **kwargs)))
        if not self._idle.acquire(blocking=False) and self._num_left:
            self._num_left -= 1
            Thread(target=_work, args=(self._calls, self._idle), name=self._name, daemon=True).start()
        return future


def _work(calls: SimpleQueue, idle: Semaphore) -> None:
    """Until there is no pool any more."""
    while (task := calls.get()) is not None:
        future, call = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  whoever asks for the result gets it
                future.set_exception(error)
        del task, future, call  # an idle thread holds nothing
        idle.release()
    calls.put(None)  # for the other threads
