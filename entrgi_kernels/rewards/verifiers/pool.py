"""Asking a function about many texts at once, in threads or processes, each for so long and no longer."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Function = Callable[[str, str], Any]
Item = tuple[str, str]
# A number, or None and why there is none.
Verdict = tuple[float | None, str]

_GRACE = 5  # seconds after the limit at which a process ends itself, should nobody be left to end it


class Pool:
    """Asks a function about (prompt, text) pairs, several at a time.

    Args:
        function: of (prompt, text).
        workers: how many at a time.
        timeout: seconds for one pair; None for no limit.
        processes: in processes, which can be ended; a thread that takes too long is left behind.

    Raises:
        TypeError: a function that cannot be sent to a process.
    """

    def __init__(self, function: Function, workers: int, timeout: float | None, processes: bool) -> None:
        self._function, self._workers, self._timeout = function, workers, timeout
        self._kind: type[_Thread] | type[_Process] = _Process if processes else _Thread
        self._idle: list[_Thread | _Process] = []  # kept: a process takes seconds to start
        if processes:
            try:
                pickle.dumps(function)
            except Exception as error:
                raise TypeError(
                    f"processes=True sends the function to processes, and {function!r:.100} does not pickle ({error}): "
                    "expected one that is defined at the top of a module"
                ) from error

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict a pair, in order."""
        workers = ThreadPoolExecutor(max(1, min(self._workers, len(items))))
        try:
            return list(workers.map(self._ask, items))
        finally:
            workers.shutdown(wait=False, cancel_futures=True)

    def _ask(self, item: Item) -> Verdict:
        worker = self._idle.pop() if self._idle else self._kind(self._function, self._timeout)
        try:
            verdict = worker.ask(item, self._timeout)
        except (queue.Empty, TimeoutError):
            worker.end()
            return None, f"took longer than {self._timeout:g} s"
        except (EOFError, ConnectionError):
            worker.end()
            return None, "ended its process"
        self._idle.append(worker)
        return verdict


class _Thread:
    """A thread that asks; a daemon, so that one left behind does not keep the interpreter from ending."""

    def __init__(self, function: Function, timeout: float | None) -> None:
        self._asked: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
        threading.Thread(target=_answer, args=(function, self._asked, self._told), daemon=True).start()

    def ask(self, item: Item, timeout: float | None) -> Verdict:
        self._asked.put(item)
        return self._told.get(timeout=timeout)

    def end(self) -> None:
        self._asked.put(None)  # once it comes back

    __del__ = end


def _answer(function: Function, asked: queue.SimpleQueue[Item | None], told: queue.SimpleQueue[Verdict]) -> None:
    while (item := asked.get()) is not None:
        told.put(verdict_of(function, item))


class _Process:
    """A process that asks, with a session of its own, which is ended as a whole."""

    def __init__(self, function: Function, timeout: float | None) -> None:
        # Its server has no threads, no CUDA and, with what it is told to import, torch already.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__, getattr(function, "__module__", __name__)])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, timeout, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._pipe.recv()  # ready: the time to start is nobody's
        except EOFError:
            raise RuntimeError(
                "the process of a verifier ended before its first text: expected a function that another process can "
                "import (a script needs `if __name__ == '__main__':`)"
            ) from None

    def ask(self, item: Item, timeout: float | None) -> Verdict:
        self._pipe.send(item)
        if not self._pipe.poll(timeout):
            raise TimeoutError
        return self._pipe.recv()

    def end(self) -> None:
        assert self._process.pid is not None  # started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._pipe.close()


def _serve(function: Function, timeout: float | None, pipe: Any) -> None:
    os.setsid()
    pipe.send(None)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        if timeout is not None:
            signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)
        verdict = verdict_of(function, item)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(verdict)


def verdict_of(function: Function, item: Item) -> Verdict:
    """What a function says of a pair: a number, or why it says none."""
    try:
        value = function(*item)
        if value is None or isinstance(value, (str, bytes)):
            return None, f"returned {type(value).__name__}: expected a number or a bool"
        number = float(value)
    except BaseException as error:  # SystemExit too
        return None, f"{type(error).__name__}: {error}"[:200]
    return (number, "") if math.isfinite(number) else (None, f"returned {number}")
