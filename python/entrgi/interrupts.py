"""Ctrl-C: the first ends a command in order, and the next one at once. Neither shows a traceback."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator

from .errors import is_the_machines

EXIT_INTERRUPTED = 130


class Interrupts:
    """The handler of SIGINT while a command runs.

    What a command has written is in its files by then, and what it leaves half done is what a kill leaves.

    Attributes:
        told: whether there was a Ctrl-C. What a library makes of it (an import that fails, say) is no error then.
        name: of the command, for the line that says so.
        traceback: whether errors are to be shown with theirs.
    """

    def __init__(self) -> None:
        self.told, self.name, self.traceback, self._said = False, "entrgi", False, False
        self._process = os.getpid()

    def __call__(self, number: int, frame: object) -> None:
        if not self.told:
            self.told = True
            raise KeyboardInterrupt
        if os.getpid() != self._process:  # forked: saying so is the parent's, and so is what was printed before
            os._exit(EXIT_INTERRUPTED)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # should a reader hold up what is left of standard output
        if not self._said:
            with contextlib.suppress(OSError):
                os.write(2, self._line().encode())  # print may be what was interrupted
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)

    def say(self, error: Exception | None = None) -> int:
        """Say so; the exit code.

        Args:
            error: what ended the command. A line of its own, unless it is only what was made of the Ctrl-C.
        """
        self._said = True
        print(self._line(), end="", file=sys.stderr)
        if error is not None and (_is_of_the_disk_or_memory(error) or not _comes_of_ctrl_c(error)):
            said = textwrap.shorten(" ".join(str(error).split()), 240, placeholder=" ...")
            print(f"{self.name}: then {type(error).__name__}{said and f': {said}'}", file=sys.stderr)
        return EXIT_INTERRUPTED

    def _line(self) -> str:
        return f"\n{self.name}: interrupted\n"


def _comes_of_ctrl_c(error: BaseException) -> bool:
    """Whether a KeyboardInterrupt is what the error was made of, or arose beside."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if isinstance(one, KeyboardInterrupt):
            return True
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            waiting += [one.__cause__, one.__context__]
    return False


def _is_of_the_disk_or_memory(error: Exception) -> bool:
    """A clean-up that failed, say: no library makes that of a Ctrl-C."""
    return is_the_machines(error) and not isinstance(error, InterruptedError)


@contextlib.contextmanager
def listening(*, for_good: bool) -> Iterator[Interrupts]:
    """Handle SIGINT, where nobody else does.

    Args:
        for_good: afterwards too, while the process ends.
    """
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts)
    if for_good:  # among the last things of a process, whose exit code is settled by then
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        yield interrupts
    finally:
        if for_good:
            interrupts.told = True  # nobody is left to catch anything
        else:
            signal.signal(signal.SIGINT, before)
