"""The pool does what the library's does, but for the threads that it leaves."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import wait

import pytest

from trl_selective.experts.daemon_pool import DaemonPool


@pytest.fixture
def name(request) -> str:
    """Of the threads of one test."""
    return request.node.name


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_a_future_has_what_the_call_returns_or_raises(name):
    pool = DaemonPool(2, name)
    assert pool.submit(divmod, 7, 3).result() == (2, 1)
    assert pool.submit(sorted, [1, 2], reverse=True).result() == [2, 1]
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 7, 0).result()
    assert pool.submit(divmod, 7, 3).result() == (2, 1)  # the thread goes on


def test_as_many_calls_at_once_as_there_are_threads(name):
    pool, running, most, lock = DaemonPool(3, name), 0, 0, threading.Lock()

    def call(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return number

    futures = [pool.submit(call, number) for number in range(12)]
    assert [future.result() for future in futures] == list(range(12))
    assert most == 3


def test_an_idle_thread_is_used_again(name):
    pool = DaemonPool(8, name)
    for _ in range(5):
        pool.submit(int).result()
        time.sleep(0.01)  # until it is idle
    assert len(threads(name)) == 1


def test_a_cancelled_call_never_runs(name):
    pool, gate, ran = DaemonPool(1, name), threading.Event(), []
    first = pool.submit(gate.wait)
    second = pool.submit(ran.append, "second")
    assert second.cancel()
    gate.set()
    wait([first, pool.submit(int)])
    assert not ran


def test_threads_end_with_the_pool(name):
    pool = DaemonPool(4, name)
    wait([pool.submit(time.sleep, 0.02) for _ in range(4)])
    assert len(threads(name)) == 4
    del pool
    for thread in threads(name):
        thread.join(timeout=10)
    assert not threads(name)


@pytest.mark.parametrize("end", ["", "raise KeyboardInterrupt"])
def test_the_process_does_not_wait_for_them(end):
    code = f"""
import time
from trl_selective.experts.daemon_pool import DaemonPool
pool = DaemonPool(1, "waits")
pool.submit(time.sleep, 3600)
print("it is called")
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, check=False, text=True)
    assert done.stdout == "it is called\n"
    assert ("KeyboardInterrupt" in done.stderr) == bool(end) == bool(done.returncode)


def test_an_idle_thread_holds_no_result(name):
    class Result:
        pass

    pool = DaemonPool(1, name)
    held = weakref.ref(pool.submit(Result).result())
    pool.submit(int).result()
    gc.collect()
    assert held() is None
