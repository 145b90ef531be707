"""csrc/cuda/hopper compiled over emulation/hopper, with faults planted in it, and its jobs as ctypes sees them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_tree import SOURCES

HERE = Path(__file__).parent
# _FORTIFY_SOURCE takes a jump from one stack to another for an error.
FLAGS = [
    "-std=c++20", "-fPIC", "-U_FORTIFY_SOURCE", "-D__CUDA_ARCH_FEAT_SM90_ALL", "-DENTRGI_HOPPER_CANDIDATES",
    "-Wno-unknown-pragmas", "-I.",
]  # fmt: skip
UNITS = {"machine.cpp": "-O3", "harness.cpp": "-O1", "forward.cu": "-O1", "update.cu": "-O1", "candidates.cu": "-O0"}


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("rows", "columns", "stride"))]

    @classmethod
    def of(cls, t: torch.Tensor | None) -> Matrix:
        return cls() if t is None else cls(t.data_ptr(), t.shape[0], t.shape[1], t.stride(0))


def _fields(matrices: str, pointers: str, integers: str, flags: str, floats: str) -> list[tuple[str, type]]:
    kinds = (matrices, Matrix), (pointers, ctypes.c_void_p), (integers, ctypes.c_int32), (flags, ctypes.c_bool)
    return [(name, kind) for names, kind in (*kinds, (floats, ctypes.c_float)) for name in names.split()]


class ForwardJob(ctypes.Structure):
    _fields_ = _fields(
        "logits table", "maximum logsum soft parts", "parts_count slices slice_length", "", "inverse"
    )  # fmt: skip


class UpdateJob(ctypes.Structure):
    _fields_ = _fields(
        "logits grad table exp_avg exp_avg_sq", "delta lse", "", "reads writes wide_moments",
        "inverse step_size root_correction beta1 beta2 eps",
    )  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """`statement`, where it follows `after`, becomes `instead`."""

    statement: str
    instead: str = ""
    after: str = ""


def planted(source: str, faults: Sequence[Sequence[Edit]], first: int) -> str:
    """A source that has the edits of `faults[i]` where emulation::mutant is `first + i`: one build has them all."""
    for number, edits in enumerate(faults, first):
        for edit in edits:
            whole = edit.after + edit.statement
            assert whole in source, f"{whole!r} is not in the kernel any more: plant the fault elsewhere"
            switch = f"if (emulation::mutant == {number}) {{ {edit.instead} }} else {{ {edit.statement} }}"
            source = source.replace(whole, edit.after + switch)
    return source


def build(folder: Path, faults: dict[str, Sequence[Sequence[Edit]]]) -> ctypes.CDLL | str:
    """The library of launchers under the emulation, or why it cannot be built here.

    Args:
        folder: to build in. faults: of each file, numbered from 1 on over all of them.
    """
    if sys.platform != "linux":
        return "the emulation switches stacks as Linux does"
    compiler = shutil.which(os.environ.get("CXX", "g++").split()[0])
    if compiler is None:
        return "no C++ compiler to emulate the CUDA kernels with"
    probe = subprocess.run([compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
    if probe.returncode != 0:
        return f"{compiler} does not know C++20"
    # The emulation's primitives.cuh lies in place of the real one, and its cuda.h where CUDA's would be found.
    for path in [*(SOURCES / "hopper").iterdir(), *(HERE / "emulation" / "hopper").iterdir()]:
        shutil.copy(path, folder)
    first = 1
    for name, some in faults.items():
        text = planted((folder / name).read_text(encoding="utf-8"), some, first)
        (folder / name).write_text(text, encoding="utf-8")
        first += len(some)
    running = []
    for name, level in UNITS.items():
        command = [compiler, *FLAGS, level, "-x", "c++", "-c", name, "-o", f"{name}.o"]
        running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder)))
    for command, process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, f"{' '.join(command)}\n{errors}"
    objects = [f"{name}.o" for name in UNITS]
    subprocess.run([compiler, "-shared", *objects, "-o", "hopper.so"], check=True, cwd=folder)
    handle = ctypes.CDLL(str(folder / "hopper.so"))
    handle.forward.argtypes = [ctypes.POINTER(ForwardJob), ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    handle.update.argtypes = [ctypes.POINTER(UpdateJob), ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    handle.candidate_name.argtypes = [ctypes.c_size_t]
    for function in (handle.forward, handle.update, handle.candidate_name):
        function.restype = ctypes.c_char_p
    return handle
