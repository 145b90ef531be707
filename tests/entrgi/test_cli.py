"""The `entrgi` command: its table of subcommands and its exit codes."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from entrgi import cli
from entrgi.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_row_of_the_table_works(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(cli.COMMANDS[name].module)
    assert callable(module.run)
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: entrgi {name}" in capsys.readouterr().out


def test_help_lists_every_command_and_loads_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name.split()[0] in text for name in cli.COMMANDS)

    program = (
        "import sys\nfrom entrgi.cli import COMMANDS, main\n"
        "def loaded(*arguments):\n"
        "    try:\n        main([*arguments, '--help'])\n    except SystemExit:\n        pass\n"
        "    return {'torch', 'transformers', 'entrgi.generate', 'entrgi.compare'} & set(sys.modules)\n"
        "first = loaded()\n"
        "print(sorted(first), [name for name in COMMANDS if {'torch', 'transformers'} & loaded(*name.split())])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.splitlines()[-1] == "[] []"


def _command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    module = types.ModuleType("entrgi_test_command")
    module.add_arguments = lambda parser: parser.add_argument("--traceback", action="store_true")  # type: ignore
    module.run = run  # type: ignore
    monkeypatch.setitem(sys.modules, "entrgi_test_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("entrgi_test_command", "for this test"))


def _raises(error: BaseException):
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _command(monkeypatch, lambda args: 7)
    assert cli.main(["probe"]) == 7
    _command(monkeypatch, lambda args: None)
    assert cli.main(["probe"]) == 0
    _command(monkeypatch, _raises(UsageError("K must be at least 1, got 0")))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "entrgi probe: error: K must be at least 1, got 0\n"
    with pytest.raises(UsageError):
        cli.main(["probe", "--traceback"])
    _command(monkeypatch, _raises(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    _command(monkeypatch, _raises(OSError(28, "No space left on device", "a.jsonl")))
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err.endswith("\nentrgi probe: error: [Errno 28] No space left on device: 'a.jsonl'\n")
    with pytest.raises(OSError):
        cli.main(["probe", "--traceback"])
    _command(monkeypatch, _raises(torch.OutOfMemoryError("tried to allocate 2 GiB")))
    assert cli.main(["probe"]) == 1 and "2 GiB" in capsys.readouterr().err
    _command(monkeypatch, _raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        cli.main(["probe"])


WANTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0.\nDefaultCPUAllocator: can't allocate memory: 2 GiB"),
    OSError(12, "Cannot allocate memory"),
    MemoryError("/models/large: Cannot allocate memory (os error 12)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", WANTS, ids=lambda error: type(error).__name__)
def test_want_of_memory_is_one_line_that_says_what_to_lower(
    error: Exception, entrgi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("generate", "compare"):
        monkeypatch.setattr(importlib.import_module(f"entrgi.{module}"), "run", _raises(error))
        assert entrgi(module, "Why?", "-K", 9) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"entrgi {module}: error: out of memory") and " ".join(str(error).split()) in line
        assert "lower --batch-size or --num-samples (now 9) or --max-new-tokens" in line
        with pytest.raises(type(error)):
            entrgi(module, "Why?", "--traceback")
    _command(monkeypatch, _raises(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["probe"])


ENDINGS = {
    # A thread that is waited for when Python ends.
    "thread": "t.Thread(target=time.sleep, args=(30,)).start(); say(); time.sleep(30)",
    # What is put in order on the way out, in a place that cannot raise.
    "cleanup": "o = Slow(); say(); time.sleep(30)",
    # A library that makes another error of it.
    "wrapped": "wrapped()",
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("ending", list(ENDINGS))
def test_ctrl_c_shows_no_traceback_however_often(ending: str, times: int, answers_ctrl_c: None) -> None:
    program = f"""
import sys, threading as t, time, types
from entrgi import cli
def say():
    print("ready", flush=True)
def wrapped():
    say()
    try:
        time.sleep(30)
    except BaseException:
        raise ImportError("no numbers")
class Slow:
    def __del__(self):
        say()
        time.sleep({30 if times == 2 else 0})
def run(args):
    {ENDINGS[ending]}
module = types.ModuleType("probe")
module.add_arguments, module.run = (lambda parser: None), run
sys.modules["probe"] = module
cli.COMMANDS["probe"] = cli.Command("probe", "")
sys.argv = ["entrgi", "probe"]
code = cli.process()
say()
sys.exit(code)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    process = subprocess.Popen([sys.executable, "-c", program], **how)
    try:
        for _ in range(1 if ending == "thread" and times == 1 else times):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
        if ending == "thread" and times == 1:
            assert process.stdout.readline() == "ready\n"  # it has ended but for the thread
            process.kill()
            assert process.communicate(timeout=60)[1] == "\nentrgi probe: interrupted\n"
        else:
            assert process.communicate(timeout=20)[1] == "\nentrgi probe: interrupted\n"
            assert process.returncode == 130
    finally:
        process.kill()


def _interrupted(program: str, times: int = 1) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command whose process group is told to end when it is ready.

    Args:
        program: ends the module; `run` is what it defines for a subcommand, `entrgi probe`.
        times: how often, half a second apart.
    """
    head = """
import os, sys, time, types
from entrgi import cli
module = types.ModuleType("probe")
module.add_arguments = lambda parser: parser.add_argument("--traceback", action="store_true")
module.run = lambda args: run(args)
sys.modules["probe"] = module
cli.COMMANDS["probe"] = cli.Command("probe", "")
def ready():
    os.write(1, b"ready\\n")
    time.sleep(30)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    environment.pop("PYTHONUNBUFFERED", None)  # what is printed waits in the process
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    process = subprocess.Popen([sys.executable, "-c", head + program], **how)
    try:
        assert process.stdout.readline() == "ready\n"
        for number in range(times):
            time.sleep(0.5 if number else 0)
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=25)
        return process.returncode, out, err
    finally:
        process.kill()


SWALLOWED = """
def run(args):
    try:
        ready()
    except KeyboardInterrupt:
        pass
    raise RuntimeError("a real fault")
"""
CLEANED = """
def run(args):
    try:
        ready()
    finally:
        raise OSError(28, "No space left on device", "a.jsonl")
"""
END = "sys.argv = ['entrgi', 'probe', *{}]; sys.exit(cli.process())"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (SWALLOWED, "RuntimeError: a real fault"),
        (CLEANED, "OSError: [Errno 28] No space left on device: 'a.jsonl'"),
    ],
    ids=["swallowed", "clean-up"],
)
def test_what_comes_after_a_ctrl_c_is_not_kept_quiet(body: str, said: str, answers_ctrl_c: None) -> None:
    code, _, err = _interrupted(body + END.format([]))
    assert code == 130 and err == f"\nentrgi probe: interrupted\nentrgi probe: then {said}\n"
    code, _, err = _interrupted(body + END.format(["--traceback"]))
    assert code == 1 and "Traceback" in err and err.endswith(f"{said}\n")


def test_a_forked_process_neither_says_so_nor_prints_what_its_parent_has_printed(answers_ctrl_c: None) -> None:
    body = """
def run(args):
    print("half a line", end="")
    there, here = os.pipe()
    if os.fork() == 0:
        try:
            os.write(here, b".")
            time.sleep(30)
        except KeyboardInterrupt:
            time.sleep(5)
        os._exit(0)
    os.read(there, 1)
    try:
        ready()
    finally:
        time.sleep(5)
"""
    code, out, err = _interrupted(body + END.format([]), times=2)
    assert (code, out, err) == (130, "half a line", "\nentrgi probe: interrupted\n")


def test_main_leaves_its_caller_s_ctrl_c_alone(answers_ctrl_c: None) -> None:
    """Without arguments too: the process is the caller's."""
    body = """
import signal
def run(args):
    return 0
sys.argv = ["entrgi", "probe"]
assert [cli.main(), cli.main()] == [0, 0]
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
try:
    ready()
finally:
    print("put in order", flush=True)
"""
    code, out, err = _interrupted(body)
    assert code == -signal.SIGINT and out == "put in order\n" and err.endswith("KeyboardInterrupt\n")


def test_of_a_long_trace_the_line_that_tells_is_shown(monkeypatch, capsys) -> None:
    """As Ray sends it: its preamble first, and what happened last."""
    frames = "".join(f'  File "a{number}.py", line {number}, in load\n' for number in range(20))
    last = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    for after in ("", "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."):
        _command(monkeypatch, _raises(RuntimeError(f"ray::Replica() (pid=7)\n{frames}{last}{after}")))
        assert cli.main(["probe"]) == 1
        assert capsys.readouterr().err == f"entrgi probe: error: out of memory ({last})\n"


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_told(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    _command(monkeypatch, lambda args: print(os.environ["OMP_WAIT_POLICY"]))
    assert cli.main(["probe"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_unknown_command_and_missing_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generat"])
    assert stop.value.code == 2
    assert "invalid choice: 'generat'" in capsys.readouterr().err
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("entrgi_no_such_module", "for this test"))
    assert cli.main(["probe"]) == 1
    assert "entrgi_no_such_module" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--help",), ("env", "--json")])
def test_a_reader_that_leaves_is_no_error(arguments: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    environment.pop("PYTHONUNBUFFERED", None)  # the pipe then breaks as late as in the last flush
    quick = "import sys\nfor name in ('torch', 'transformers', 'triton'): sys.modules[name] = None\n"
    program = f"{quick}input()\nfrom entrgi.cli import main\nsys.exit(main({list(arguments)!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    errors = process.stderr.read()
    assert (process.wait(timeout=120), errors) == (0, "")
