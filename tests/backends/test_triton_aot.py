"""What is compiled ahead is what a launch looks for; nothing that a compiler does ends the rest."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process: nothing to compile", allow_module_level=True)

from benchmarks.tools import gate  # noqa: E402
from entrgi_kernels.backends import triton as kernels  # noqa: E402
from entrgi_kernels.backends.triton import aot, launch  # noqa: E402


def test_a_compiler_that_crashes_costs_its_own_launch_alone():
    jobs = [("1 + 1",), ("__import__('os')._exit(1)",), ("2 + 2",)]
    assert aot.in_processes(eval, jobs, 2, lambda job: f"lost {job[0][-8:]}") == [2, "lost _exit(1)", 4]


def test_what_is_compiled_here_is_what_a_gpu_finds_in_its_cache(tmp_path, monkeypatch):
    """The same key as Triton's own dispatch forms: compiled ahead, a launch compiles nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    machine, found = gate.MACHINES["sm_90"], []
    logits, table, grad = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((5, 304), (304, 64), (5, 64)))
    lse = torch.empty(5, device="meta")

    def calls():
        kernels.softmax_entropy(logits, 0.7)
        kernels.soft_embedding_backward(logits, table, grad, grad.float(), lse, 0.7)

    with aot.recording(machine, found.append):
        calls()
    assert [i.kernel for i in found] == ["_statistics_kernel", "_merge_kernel", "_rowdot_kernel", "_backward_kernel"]
    assert dict(found[-1].signature)["table"].startswith("tensordesc<")
    for item in found:
        aot.build(machine.gpu, item)
    made = set(os.listdir(tmp_path))
    assert made
    monkeypatch.setattr(launch, "recorder", lambda kernel, args, options: kernel.warmup(*args, grid=(1,), **options))
    with aot.standing_in(machine):
        calls()
    assert set(os.listdir(tmp_path)) == made


def test_the_cache_is_filled_for_the_gpu_at_hand(tmp_path, monkeypatch):
    """By processes of their own; of each distinct launch once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(aot, "here", lambda: gate.MACHINES["sm_90"])
    item, *_ = aot.launches(gate.MACHINES["sm_90"], [(5, 304, 64, torch.float32, torch.float32)])
    monkeypatch.setattr(aot, "launches", lambda machine, cases: {item: cases})
    assert aot.fill_cache([], workers=1) == 1 and any(tmp_path.rglob(f"{item.kernel}.cubin"))
