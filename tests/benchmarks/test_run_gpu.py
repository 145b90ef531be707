"""The script of `make gpu`, rehearsed on a CPU, so that it does not rot between two loans of a GPU."""

from __future__ import annotations

import json
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import run_gpu
from benchmarks.run_gpu import MUST, Report
from benchmarks.suites import kernels as gpu
from benchmarks.suites.kernels import REHEARSAL


@pytest.fixture
def rehearsal(tmp_path):
    """Runs parts; gives (exit status, report)."""

    def run(*arguments):
        chosen = run_gpu.arguments(["--dry", *arguments])
        report = Report(chosen.machine, tmp_path / "rows.json")
        return run_gpu.run(chosen, report), report

    return run


def test_every_part_but_the_compiler_runs(rehearsal, capsys):
    parts = [part for part in run_gpu.PARTS if part not in ("numerics", "ops", "compiled", "picture")]
    status, report = rehearsal("--parts", ",".join(parts))
    said = capsys.readouterr().out
    assert status == 0 and report.red == [], said
    found = {group.op for group in report.groups}
    assert {"guidance_step", "row statistics", "guidance update", "generation", "cross-entropy"} <= found
    assert set(MUST) <= found and all(f"{op} N" in said for op in MUST)
    assert said.count("times faster than published") == 3 and "reward backward" in said
    assert "times faster than torch.sort" in said
    assert {row["op"] for row in report.rows} >= found | {"ceiling"}
    assert report.path.exists() and "left out" not in said


def test_a_failing_part_costs_no_other(rehearsal, capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("this part is broken")

    monkeypatch.setattr(run_gpu, "kernel_group", broken)
    status, report = rehearsal("--parts", "kernels,others")
    assert status == 1 and any("this part is broken" in line for line in report.red)
    assert "RED  kernels" in capsys.readouterr().out
    assert [group.op for group in report.groups] == ["cross-entropy"]


def test_wrong_kernels_get_no_times(rehearsal, capsys, monkeypatch):
    right = gpu.kernels_are_right
    monkeypatch.setattr(run_gpu, "kernels_are_right", lambda *a: ["sample_tokens: check failed"] or right(*a))
    status, report = rehearsal("--parts", "kernels")
    assert status == 1 and report.groups == [] and "no times for kernels that are wrong" in capsys.readouterr().out


def test_time_that_is_up_leaves_parts_out(rehearsal, capsys):
    status, report = rehearsal("--parts", "kernels,step,generation,others", "--minutes", "0")
    said = capsys.readouterr().out
    assert status == 0 and report.groups == [] and said.count("left out for want of time") >= 5


def test_a_part_that_never_ends_is_stopped_and_what_was_measured_is_kept(rehearsal, capsys, monkeypatch):
    """Even where it catches what it meets, as the gate of a candidate does."""

    def endless(*args):
        while True:
            try:
                time.sleep(60)
            except Exception:
                pass

    hurry, real = [], run_gpu.deadline
    monkeypatch.setattr(run_gpu, "other_statistics", endless)
    monkeypatch.setattr(run_gpu.Run, "draws", lambda self: hurry.append(True))
    monkeypatch.setattr(run_gpu, "deadline", lambda seconds: real(0.2 if hurry else seconds))
    status, report = rehearsal("--parts", "ceilings,others")
    assert status == 1 and any("stopped after 0 s" in line for line in report.red)
    assert {row["op"] for row in json.loads(report.path.read_text())} == {"ceiling"}
    assert "RED  others (statistics)" in capsys.readouterr().out


def test_numerics_runs_once_for_each_triton(rehearsal, monkeypatch):
    ran = []

    def collected(command, env, **kwargs):
        ran.append((command, env["PYTHONPATH"]))
        return subprocess.CompletedProcess(command, 5 if len(ran) < 3 else 1)

    monkeypatch.setattr(run_gpu, "subprocess", SimpleNamespace(run=collected, TimeoutExpired=TimeoutError))
    status, report = rehearsal("--parts", "numerics", "--triton", "/other/triton", "/bad/triton")
    assert len(ran) == 3 and all("gpu" in command and "--collect-only" in command for command, _ in ran)
    assert not ran[0][1].startswith("/other") and ran[1][1].startswith("/other/triton")
    assert status == 1 and report.red == ["numerics: pytest -m gpu with the Triton in /bad/triton"]


def test_the_picture(tmp_path, rehearsal):
    pytest.importorskip("matplotlib")
    status, report = rehearsal("--parts", "kernels,picture")
    assert status == 0 and report.path.with_suffix(".png").stat().st_size > 1000


def test_the_rehearsal_is_small_and_the_machine_is_not():
    assert REHEARSAL.device == "cpu" and gpu.Machine().shapes[-1].n == 4096
    if not torch.cuda.is_available():
        assert run_gpu.main([]) == 2
