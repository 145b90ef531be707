"""A verifier that runs Python code and its tests, in a process of its own and within limits."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import sandbox
from .answers import task_of

logger = logging.getLogger("entrgi_kernels")

_START = 10.0  # seconds that the interpreter may take to start, beyond the limit
_ASKING = threading.Lock()
_FILES, _FILE_BYTES = 256, 16 << 20
_SAID = {
    sandbox.TIME: "the time limit",
    sandbox.PROCESSES: "the limit of processes",
    sandbox.MEMORY: "the memory limit",
}


@dataclass(frozen=True)
class PythonTests:
    """Whether the Python code in a text passes its tests.

    The code is the last block between ``` marks, or else the whole text. It is executed as a module named "solution",
    and the tests behind it in the same module: statements (``assert add(1, 2) == 3``), and functions named ``test...``
    of their own, which are called. Every run has an interpreter, a session and a temporary folder of its own, no
    network, and no environment or files of ours. What is left to code that means harm: docs/rewards.md.

    Args:
        tests: Python code; or by prompt, as a mapping or a function.
        timeout: seconds of a run, and of the processor.
        memory: bytes that a process may address, and that all of a run may hold together.
        processes: processes and threads of a run.

    Raises:
        ValueError, TypeError: a limit out of range.
    """

    tests: str | Mapping[str, str] | Callable[[str], str]
    timeout: float = 5.0
    memory: int = 512 << 20
    processes: int = 16

    def __post_init__(self) -> None:
        for name, low in (("timeout", 0.0), ("memory", 64 << 20), ("processes", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r}: expected a number")
            if not low <= value < math.inf or value == 0:
                raise ValueError(f"{name}={value!r}: expected a finite number above {low:g}")

    def __call__(self, prompt: str, text: str) -> bool:
        reason = self.run(code_of(text), task_of(self.tests, prompt))
        if reason is not None:
            logger.debug("code did not pass its tests: %s", reason)
        return reason is None

    def run(self, code: str, tests: str) -> str | None:
        """Run code and tests; None where it passes, else what went wrong.

        Raises:
            RuntimeError: the process that runs it could not be started, or was killed from outside.
        """
        isolated = isolates()
        token = secrets.token_hex(sandbox._TOKEN // 2).encode()
        seconds = math.ceil(self.timeout) + 1
        limits = {
            "isolate": isolated,
            "seconds": self.timeout,
            "processes": self.processes,
            "memory": self.memory,
            "resources": {
                "RLIMIT_CPU": seconds,
                "RLIMIT_AS": int(self.memory),
                "RLIMIT_FSIZE": _FILE_BYTES,
                "RLIMIT_NOFILE": _FILES,
                "RLIMIT_CORE": 0,
            },
        }
        parts = [json.dumps(limits).encode(), *(part.encode(errors="replace") for part in (code, tests))]
        header = " ".join(str(len(part)) for part in parts).encode() + b"\n"
        with (
            tempfile.TemporaryDirectory(prefix="entrgi-", ignore_cleanup_errors=True) as folder,
            # Files, not pipes: nobody waits for a reader, and no child keeps one open.
            tempfile.TemporaryFile() as source,
            tempfile.TemporaryFile() as verdict,
        ):
            source.write(b"".join([header, *parts, token]))
            source.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", sandbox.__file__],
                stdin=source,
                stdout=verdict,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_environment(folder),
                start_new_session=True,
            )
            try:
                status = process.wait(self.timeout + _START)
            except subprocess.TimeoutExpired:
                status = sandbox.TIME
            finally:
                # The whole session, whatever is left of it.
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
            verdict.seek(0)
            said = verdict.read(2000)
        if status in _SAID:
            return _SAID[status]
        if status != 0:
            tail = said.decode(errors="replace").strip()[-300:]
            raise RuntimeError(f"the process that runs code under test ended with status {status}: {tail}")
        if said == token:
            return None
        return said.decode(errors="replace") or "ended before the tests had run"


def code_of(text: str) -> str:
    """The Python code in a text: the last block between ``` marks, or else all of it."""
    blocks = re.findall(r"^```[^\n`]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return blocks[-1] if blocks else text


def isolates() -> bool:
    """Whether the kernel gives code under test its own processes and no network; says once where it does not."""
    with _ASKING:
        return _isolates()


@functools.cache
def _isolates() -> bool:
    asked = f"import runpy, sys; sys.exit(not runpy.run_path({str(Path(sandbox.__file__))!r})['isolate']())"
    isolated = subprocess.run([sys.executable, "-I", "-c", asked], capture_output=True).returncode == 0
    if not isolated:
        logger.warning(
            "this kernel gives code under test no namespaces of its own (unshare is refused): network, processes and "
            "signals are refused by an audit hook of its interpreter instead, which stops accidents alone"
        )
    return isolated


def _environment(folder: str) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads}
