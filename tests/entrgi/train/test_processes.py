"""Two processes, and a process that is killed: both in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_cases import losses

from entrgi.train import records

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("train_cases.py")
TIMEOUT = 300


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def _start(folder: Path, processes: int = 1, **changes) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), json.dumps(changes)]
    output = open(folder / "output.txt", "ab")  # noqa: SIM115  the child keeps it
    return subprocess.Popen(command, env=_environment(), stdout=output, stderr=output)


def _finish(process: subprocess.Popen, folder: Path) -> None:
    try:
        code = process.wait(timeout=TIMEOUT)
    finally:
        process.kill()
    assert code == 0, (folder / "output.txt").read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rgrl-entrgi", "diffu-grpo"])
def test_two_processes_take_the_steps_of_one(tiny_weights, tmp_path, method):
    settings = {"method": method, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    if method == "diffu-grpo":
        settings |= {"num_iterations": 2, "beta": 0.3, "ref_model_sync_steps": 1}
    running = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        running.append((_start(folder, count, **settings, per_device_train_batch_size=2 // count), folder))
    for process, folder in running:
        _finish(process, folder)
    one, two = (folder for _, folder in running)
    assert [s for s, _ in losses(two)] == [1, 2]
    assert [value for _, value in losses(two)] == pytest.approx([value for _, value in losses(one)], rel=1e-5, abs=1e-8)
    for a, b in zip(records.read(one, records.LOG), records.read(two, records.LOG), strict=True):
        for name in a.keys() & {"reward", "reward_std", "completion_length", "entropy_weight", "kl", "grad_norm"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-9), name
    assert records.read(two, records.EVALUATIONS) == records.read(one, records.EVALUATIONS)
    ours, theirs = (torch.load(folder / "parameters.pt") for folder in (two, one))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.slow
def test_processes_agree_on_what_is_not_finite(tiny_weights, tmp_path):
    """The second process has no reward at all in one step, or a NaN in a gradient."""
    settings = {"method": "diffu-grpo", "max_steps": 2, "num_iterations": 1, "per_device_train_batch_size": 1}
    running = {what: _start(tmp_path / what, 2, **settings, spoil=what) for what in ("rewards", "gradient")}
    _finish(running["rewards"], tmp_path / "rewards")
    assert records.read(tmp_path / "rewards", records.LOG)[1]["reward_missing"] == 2
    assert all(value.isfinite().all() for value in torch.load(tmp_path / "rewards" / "parameters.pt").values())
    assert running["gradient"].wait(timeout=TIMEOUT) != 0
    said = (tmp_path / "gradient" / "output.txt").read_text()
    assert said.count("ArithmeticError: the gradient of step 2 is NaN or infinite") == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny_weights, tmp_path):
    settings = {"method": "diffu-grpo", "num_iterations": 3, "max_steps": 8, "beta": 0.3, "ref_model_sync_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = _start(whole, **settings)
    process = _start(killed, **settings)
    deadline = time.monotonic() + TIMEOUT
    while len(losses(killed)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (killed / "output.txt").read_text()[-3000:]
    done = len(losses(killed))
    assert 5 <= done < 8 and records.last_complete_checkpoint(killed) is not None
    _finish(_start(killed, **settings, resume=True), killed)
    _finish(undisturbed, whole)
    assert [step for step, _ in losses(killed)] == list(range(1, 9))
    assert losses(killed) == losses(whole)
    ours, theirs = (torch.load(folder / "parameters.pt") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
