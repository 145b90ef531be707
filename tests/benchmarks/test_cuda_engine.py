"""The GPU part of the CUDA kernels, as far as it needs no GPU: reading the tools' output."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import run_gpu
from benchmarks.harness.inputs import Shape
from benchmarks.suites import cuda_engine

# As ncu --csv --page details prints it: its own lines first, then a row a metric.
REPORT = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Context","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","void entrgi::cuda::draw_kernel<bf16, 512>(DrawJob)","1","GPU Speed Of Light","Duration","us","12.5"
"0","1","void entrgi::cuda::draw_kernel<bf16, 512>(DrawJob)","1","GPU Speed Of Light","Memory Throughput","%","88.1"
"0","1","void entrgi::cuda::draw_kernel<bf16, 512>(DrawJob)","1","Memory Workload","Memory Throughput","Tbyte/s","4.1"
"0","1","void entrgi::cuda::draw_kernel<bf16, 512>(DrawJob)","1","Compute Workload","Tensor (All)","%","0"
"0","1","void entrgi::cuda::draw_kernel<bf16, 512>(DrawJob)","1","Launch Statistics","Grid Size","","64"
"1","1","void entrgi::cuda::other(Job)","1","GPU Speed Of Light","Duration","us","3"
"""


def test_counters_are_read_by_launch():
    first, second = cuda_engine.counters(REPORT)
    assert first == {
        "kernel": "void entrgi::cuda::draw_kernel<bf16, 512>",
        "time": "12.5 us",
        "memory": "88.1 %",
        "memory rate": "4.1 Tbyte/s",
        "Tensor (All)": "0 %",
    }
    assert second == {"kernel": "void entrgi::cuda::other", "time": "3 us"}


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """compute-sanitizer as a script that prints and exits as told."""

    def make(text: str, code: int) -> None:
        script = tmp_path / "compute-sanitizer"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


def test_sanitizer_findings_in_our_kernels_are_red_and_others_are_not(tool, capsys):
    tool("========= ERROR SUMMARY: 0 errors", 0)
    assert cuda_engine.sanitize("memcheck", 20) is None
    assert "memcheck: ERROR SUMMARY: 0 errors" in capsys.readouterr().out
    tool("========= Race reported in entrgi::cuda::draw_kernel\n========= RACECHECK SUMMARY: 1 hazard", 86)
    assert "entrgi::cuda::draw_kernel" in cuda_engine.sanitize("racecheck", 20)
    tool("========= Race reported in at::native::reduce\n========= RACECHECK SUMMARY: 1 hazard", 86)
    assert cuda_engine.sanitize("racecheck", 20) is None
    tool("Device not supported", 255)
    assert "Device not supported" in cuda_engine.sanitize("memcheck", 20)


def test_what_is_missing_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cuda_engine, "why_not", lambda: "not built")
    shapes = [Shape(64, 64)]
    assert cuda_engine.numerics(9) is None
    assert cuda_engine.compare(shapes, lambda: 999.0, print) == []
    assert cuda_engine.nsight(tmp_path / "x.txt", "a GPU", "r", shapes, lambda: 999.0) == ([], None)
    assert capsys.readouterr().out.count("not built") == 3
    monkeypatch.setattr(cuda_engine, "why_not", lambda: None)
    monkeypatch.setattr(cuda_engine.shutil, "which", lambda name: None)
    assert cuda_engine.nsight(tmp_path / "x.txt", "a GPU", "r", shapes, lambda: 999.0) == ([], None)
    said = capsys.readouterr().out
    assert "no memcheck" in said and "no racecheck" in said and "ncu is not installed" in said


def test_counters_of_every_operator_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_engine, "why_not", lambda: None)
    monkeypatch.setattr(cuda_engine.shutil, "which", lambda name: "ncu" if name == "ncu" else None)
    monkeypatch.setattr(cuda_engine, "profile", lambda op, shape, backend, seconds: REPORT)
    path = tmp_path / "gpu-ncu.txt"
    assert cuda_engine.nsight(path, "a GPU", "abc", [Shape(512, 1024)], lambda: 999.0) == ([], path)
    text = path.read_text()
    assert "a GPU, revision abc" in text and text.count("time 12.5 us") == len(cuda_engine.OPS)
    assert all(op in text for op in cuda_engine.OPS)


def test_run_gpu_has_both_parts():
    assert {"cuda", "nsight"} <= set(run_gpu.PARTS)
    assert (Path(cuda_engine.ROOT) / cuda_engine.TESTS).exists()
