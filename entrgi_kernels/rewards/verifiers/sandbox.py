"""Runs code and its tests within limits: a script of its own, started by :mod:`.python` and importing nothing of ours.

Three processes. The supervisor (this script) sets the limits, watches time, processes and memory, and ends with a
status that says how it went. Where the kernel lets it, it first leaves for namespaces of its own; the first process of
those only waits, and what is left is killed with it. The runner executes the code and then the tests.

Standard input is a file: "<limits> <code> <tests>", three lengths, a line feed, and the three. Standard output is a
file too: the runner writes the last bytes of the input there, which it reads only after the tests have run. A text
there that is not these bytes says what went wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import sys
import time
import types
from typing import Any, NoReturn

TIME, PROCESSES, MEMORY = 10, 11, 12  # statuses beside 0
_TOKEN = 32  # bytes
_LOOK = 0.02  # seconds between two looks of the supervisor
_NEW_USER, _NEW_PID, _NEW_NET, _NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
_NEW_MOUNTS, _PRIVATE = 0x00020000, 0x44000  # the latter of all mounts below
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl
# What the code may not do where it shares the machine's processes and network.
_REFUSED = (
    "socket.connect", "socket.bind", "socket.send", "socket.getaddrinfo", "socket.gethostby",
    "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "subprocess.", "pty.",
)  # fmt: skip


def isolate() -> bool:
    """Leave for namespaces without a network and without the machine's processes; whether the kernel let us."""
    apart = _NEW_PID | _NEW_NET | _NEW_IPC
    libc = ctypes.CDLL(None, use_errno=True)
    return any(libc.unshare(flags) == 0 for flags in (_NEW_USER | apart, apart))


def main() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    header = b""
    while not header.endswith(b"\n"):
        header += os.read(0, 1)
    lengths = [int(length) for length in header.split()]
    limits = json.loads(os.pread(0, lengths[0], len(header)))
    for name, value in limits["resources"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    isolated = isolate() if limits["isolate"] else False
    if not isolated:
        libc.prctl(_SUBREAPER, 1, 0, 0, 0)  # orphans become ours
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # waited for below
    first = os.fork()
    if first == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if isolated:
            # A /proc of its own, so that the machine's processes are not to be read there; some containers refuse it.
            if libc.unshare(_NEW_MOUNTS) == 0 and libc.mount(b"none", b"/", None, _PRIVATE, None) == 0:
                libc.mount(b"proc", b"/proc", b"proc", 0, None)
            runner = os.fork()
            if runner:
                while os.wait()[0] != runner:  # orphans are reaped on the way
                    pass
                os._exit(0)
        run(limits, len(header) + lengths[0], lengths[1], lengths[2], isolated)
    status = watch(first, limits)
    kill_all(first)
    return status


def watch(first: int, limits: dict[str, Any]) -> int:
    """Wait for the first process; the status to end with."""
    end = time.monotonic() + limits["seconds"]
    while os.waitpid(first, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            return TIME
        below = descendants(os.getpid())
        if len(below) > limits["processes"] + 2:
            return PROCESSES
        if sum(map(resident, below)) > limits["memory"]:
            return MEMORY
        signal.sigtimedwait({signal.SIGCHLD}, _LOOK)
    return 0


def kill_all(first: int) -> None:
    """End everything below this process: with the first process of a namespace, all others in it."""
    while below := descendants(os.getpid()):
        for process in [first] if first in below else below:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def descendants(process: int) -> list[int]:
    """Processes below one."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                for child in map(int, file.read().split()):
                    found += [child, *descendants(child)]
    except OSError:  # it has ended, or this kernel does not tell
        pass
    return found


def resident(process: int) -> int:
    """Bytes of memory that a process holds by itself."""
    try:
        with open(f"/proc/{process}/statm") as file:
            held = file.read().split()
    except OSError:
        return 0
    return (int(held[1]) - int(held[2])) * resource.getpagesize()


def run(limits: dict[str, Any], start: int, code_length: int, tests_length: int, isolated: bool) -> NoReturn:
    """Execute code and tests, say how it went, and end."""
    # Bound before the code can put others in their place.
    read, write, leave, execute, build, own, whoami = (
        os.pread,
        os.write,
        os._exit,
        exec,
        compile,
        os.getpid(),
        os.getpid,
    )
    wide = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    source, verdict = random.SystemRandom().sample(range(10, wide), 2)
    os.dup2(0, source)
    os.dup2(1, verdict)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"],) * 2) if isolated else sys.addaudithook(refuse)
    code = read(source, code_length, start)
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    names = solution.__dict__
    try:
        execute(build(code, "<code>", "exec"), names)
        before = {id(value) for value in names.values()}
        execute(build(read(source, tests_length, start + code_length), "<tests>", "exec"), names)
        # As pytest has them: functions of the tests that nobody has called.
        for name, value in list(names.items()):
            if name.startswith("test") and isinstance(value, types.FunctionType) and id(value) not in before:
                value()
        said = read(source, _TOKEN, start + code_length + tests_length)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".encode(errors="replace")[:300]
    if whoami() == own:  # and no copy of us that the code made
        write(verdict, said)
    leave(0)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: no network and no processes where the kernel gave us none of our own."""
    if event.startswith(_REFUSED):
        raise PermissionError(f"{event} is not allowed in code under test")


if __name__ == "__main__":
    sys.exit(main())
