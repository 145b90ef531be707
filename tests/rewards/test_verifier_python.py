"""Code under test: what passes, and what its process, its limits and its namespaces keep in."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from entrgi_kernels.rewards.verifiers import PythonTests, python

ADD = "def add(a, b):\n    return a + b\n"
TEST = "assert add(1, 2) == 3"
SMALL = PythonTests(TEST, timeout=10, memory=128 << 20, processes=6)


@pytest.fixture(params=["namespaces", "audit hook"], autouse=True)
def isolated(request, monkeypatch) -> bool:
    """Both ways of keeping code in, where this kernel has both."""
    wanted = request.param == "namespaces"
    if wanted and not python.isolates():
        pytest.skip("this kernel refuses unshare")
    monkeypatch.setattr(python, "isolates", lambda: wanted)
    return wanted


def left_over() -> list[str]:
    """Processes of code under test that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
            if b"sandbox.py" in line and os.getpgid(int(folder.name)) != os.getpgid(0):
                found.append(folder.name)
        except OSError:
            continue
    return found


def test_code_and_tests():
    assert SMALL("p", ADD) and SMALL("p", f"Try:\n```python\n1 / 0\n```\nOr better:\n```python\n{ADD}```\nDone.")
    assert not SMALL("p", ADD.replace("+", "-")) and not SMALL("p", "") and not SMALL("p", "def (")
    called = "def test_small():\n    assert add(1, 2) == {}\n"
    assert SMALL.run(ADD, called.format(3)) is None
    assert SMALL.run(ADD, called.format(4)) == "AssertionError: "
    assert SMALL.run(ADD, "assert add(0, 0)") and SMALL.run(ADD, "import absent").startswith("ModuleNotFoundError")
    record = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\n"
    assert SMALL.run(record, "assert P(3).x == 3") is None
    by_prompt = PythonTests({"p": TEST, "q": "assert add(1, 2) == 4"})
    assert by_prompt("p", ADD) and not by_prompt("q", ADD)
    with pytest.raises(LookupError):
        by_prompt("r", ADD)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise KeyError(3)", "KeyError: 3"),
        ("x = 'a' * (1 << 30)", "MemoryError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended before the tests had run"),
        ("open('large', 'wb').write(bytes(20 << 20))", "File too large"),
        ("input()", "EOFError"),
        ("import socket\nsocket.create_connection(('192.0.2.1', 80), 2)", "Network is unreachable|not allowed"),
        ("import os, sys\nos.write(1, b'0' * 32)\nprint('passed')\nsys.exit()", "SystemExit"),
    ],
)
def test_what_goes_wrong_costs_the_verdict_alone(code, reason):
    said = SMALL.run(ADD + code, TEST)
    assert said is not None and re.search(reason, said), said


@pytest.mark.parametrize("code", ["while True:\n    pass", "import time\ntime.sleep(60)"])
def test_an_endless_loop_is_ended(code):
    assert PythonTests(TEST, timeout=0.5).run(ADD + code, TEST) == "the time limit"
    assert not left_over()


def test_output_is_thrown_away():
    code = "import sys\nfor _ in range(500):\n    print('x' * 10000)\n    sys.stderr.write('y')"
    assert SMALL.run(ADD + code, TEST) is None


def test_processes_are_counted(isolated):
    fork = "import os, time\nfor _ in range(16):\n    if os.fork() == 0:\n        time.sleep(60)\n        os._exit(0)\n"
    said = SMALL.run(ADD + fork + "time.sleep(60)", TEST)
    assert said == "the limit of processes" or "BlockingIOError" in said if isolated else "os.fork" in said
    thread = "import threading, time\nfor _ in range(64):\n    threading.Thread(target=time.sleep, args=(9,)).start()"
    assert SMALL.run(ADD + thread, TEST) is not None
    assert not left_over()


def test_a_copy_of_the_process_says_nothing(isolated):
    if isolated:
        fork = "import os, sys\nchild = os.fork()\nif child == 0:\n    {}\nos.waitpid(child, 0)\n"
        for ending in ("sys.exit()", "raise ValueError", "pass"):
            assert (
                SMALL.run(ADD + fork.format(ending).replace("os.waitpid(child", "child and os.waitpid(child"), TEST)
                is None
            )


def test_memory_of_all_processes_together(isolated):
    child = "    if os.fork() == 0:\n        x = bytearray(60 << 20)\n        time.sleep(60)\n"
    code = f"import os, time\nfor _ in range(3):\n{child}"
    said = SMALL.run(ADD + code + "time.sleep(60)", TEST)
    assert said == "the memory limit" if isolated else "os.fork" in said


def test_nobody_else_is_killed(isolated):
    survived = []
    before = signal.signal(signal.SIGTERM, lambda *_: survived.append(False))
    try:
        SMALL.run(ADD + "import os\nos.kill(os.getppid(), 15)\nos.kill(os.getppid(), 9)", TEST)
        SMALL.run(ADD + f"import os\nos.kill({os.getpid()}, 15)", TEST)
        if isolated:  # it would reach everybody otherwise
            SMALL.run(ADD + "import os\nos.kill(-1, 15)", TEST)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert survived == [] and SMALL.run(ADD, TEST) is None


def test_nothing_is_left_behind(isolated, tmp_path, monkeypatch):
    monkeypatch.setattr(python.tempfile, "tempdir", str(tmp_path))
    if isolated:
        child = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
        code = ADD + child + "    os._exit(0)\n"
        assert SMALL.run(code, TEST) is None and SMALL.run(code + "import sys\nsys.exit()", TEST) == "SystemExit: "
    assert SMALL.run(ADD + "import os\nos.mkdir('a')\nopen('a/b', 'w').write('c')\nos.chmod('a', 0)", TEST) is None
    assert not left_over() and not list(tmp_path.iterdir())


def test_what_it_sees(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "1")
    with open(tmp_path / "ours", "w") as ours:
        os.set_inheritable(ours.fileno(), True)
        code = (
            "import os\nassert 'SECRET' not in os.environ\nassert os.getcwd() == os.environ['HOME']\n"
            "for path in map('/proc/self/fd/'.__add__, os.listdir('/proc/self/fd')):\n"
            "    assert not os.path.exists(path) or 'ours' not in os.readlink(path)\n"
        )
        assert SMALL.run(ADD + code, TEST) is None


def test_other_processes_are_not_to_be_seen(isolated):
    own = ["unshare", "--user", "--pid", "--fork", "--mount-proc", "true"]
    if not isolated or not shutil.which("unshare") or subprocess.run(own, capture_output=True).returncode:
        pytest.skip("this kernel gives no /proc of its own")
    assert SMALL.run(ADD + "import os\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) == 2", TEST) is None


def test_tests_are_not_to_be_seen_before_they_run():
    """Not in any frame, nor in anything that the collector knows."""
    code = ADD + (
        "import gc, sys\nframe, seen = sys._getframe(), []\nwhile frame:\n    seen += [repr(frame.f_locals)]\n"
        "    frame = frame.f_back\nseen += [repr(o) for o in gc.get_objects() if type(o) in (list, tuple, dict)]\n"
        "marked = ''.join(['ses', 'ame'])\nassert not any(marked in one for one in seen)"
    )
    assert SMALL.run(code, f"{TEST}  # sesame") is None


def test_a_process_that_does_not_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(python.sandbox, "__file__", "/absent/sandbox.py")
    with pytest.raises(RuntimeError, match="ended with status 2: .*absent"):
        SMALL.run(ADD, TEST)


def test_limits_are_checked():
    for name, wrong in (("timeout", 0), ("timeout", float("inf")), ("memory", 1), ("processes", 0)):
        with pytest.raises(ValueError, match=f"{name}=.*: expected a finite number"):
            PythonTests(TEST, **{name: wrong})
    with pytest.raises(TypeError, match="timeout='1'"):
        PythonTests(TEST, timeout="1")


def test_it_says_once_that_the_kernel_refuses(monkeypatch, caplog):
    monkeypatch.undo()  # the real one
    python._isolates.cache_clear()
    monkeypatch.setattr(python.sandbox, "__file__", "/absent/sandbox.py")
    with caplog.at_level(logging.WARNING, logger="entrgi_kernels"):
        assert [python.isolates(), python.isolates()] == [False, False]
    assert sum("unshare is refused" in record.message for record in caplog.records) == 1
    python._isolates.cache_clear()
