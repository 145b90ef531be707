"""The real thing with the tiny models: kill -9, several processes and Ray all end with the files of an unbroken run."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrgi.cli import main

ROOT = Path(__file__).resolve().parents[3]
GRID = ["evaluate", "tiny", "-n", "4", "--batch-size", "1", "--methods", "none,entrgi", "-K", "2", "--best-of", "2",
        "-T", "4", "-L", "16", "-M", "1", "--traces", "1", "--device", "cpu", "--no-report", "--quiet",
        "--set", "judges=[{kind: reward}, {kind: rule}]"]  # fmt: skip
EQUAL = ("samples.jsonl", "judgements.jsonl", "traces.jsonl")
KILLS = 10

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_weights")]


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in EQUAL}


@pytest.fixture(scope="module")
def processes():
    """Processes forked from a clean one that has imported everything: they start in a moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "scipy.stats", "entrgi_kernels", "entrgi.evaluate"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as many threads as the processes that torchrun and Ray start have
        first = context.Process(target=str)  # the clean one starts with the first, and keeps this environment
        first.start()
        first.join()
    return context


def launch(*command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def unbroken(processes, tmp_path_factory) -> tuple[Path, float]:
    """(folder, seconds) of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    start = time.monotonic()
    process = processes.Process(target=main, args=([*GRID, "-o", str(folder)],))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    return folder, time.monotonic() - start


def test_killed_ten_times(processes, unbroken, tmp_path) -> None:
    expected, seconds = unbroken
    rng = random.Random(time.time_ns())

    def written() -> int:
        found = [*(tmp_path / "parts").glob("samples-*"), *tmp_path.glob("samples.jsonl")]
        return sum(path.read_bytes().count(b"\n") for path in found)

    grown, ends = [0], []
    for _ in range(KILLS):
        process = processes.Process(target=main, args=([*GRID, "-o", str(tmp_path)],))
        process.start()
        # At any moment, but not much after it has written something more: it may be faster than the unbroken one was.
        end = time.monotonic() + seconds * rng.uniform(0.2, 0.8)
        while process.is_alive() and time.monotonic() < end and written() == grown[-1]:
            time.sleep(0.01)
        time.sleep(seconds * rng.uniform(0.0, 0.02))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        ends.append(process.exitcode)
        grown.append(written())
    assert set(ends) <= {0, -signal.SIGKILL} and ends[0] != 0
    assert grown == sorted(grown), "nothing that was written is lost"
    process = processes.Process(target=main, args=([*GRID, "-o", str(tmp_path)],))
    process.start()
    process.join(240)
    assert process.exitcode == 0 and content(tmp_path) == content(expected)
    assert not (tmp_path / "parts").exists()


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_two_processes_equal_one(unbroken, tmp_path) -> None:
    launch(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
           "-m", "entrgi", *GRID, "-o", str(tmp_path))  # fmt: skip
    assert content(tmp_path) == content(unbroken[0])
    devices = [json.loads(line)["device"] for line in (tmp_path / "batches.jsonl").read_text().splitlines()]
    assert len(devices) == 8


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_with_an_actor_killed_equals_one(unbroken, tmp_path) -> None:
    """The first actor to be at its third batch kills itself, with all that it holds."""
    flag = tmp_path / "killed"
    script = f"""
import os, pathlib, signal, sys
from entrgi.evaluate import ray_data
from entrgi.cli import main

whole = ray_data.Actor.__call__
def dying(self, row):
    self.count = getattr(self, "count", 0) + 1
    if self.count == 3:
        try:
            os.close(os.open({str(flag)!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, row)
ray_data.Actor = type("Dying", (ray_data.Actor,), {{"__call__": dying}})
sys.exit(main({[*GRID, "-o", str(tmp_path / "r"), "--ray", "2"]!r}))
"""
    launch(sys.executable, "-c", script)
    assert flag.exists(), "no actor was killed"
    assert content(tmp_path / "r") == content(unbroken[0])
