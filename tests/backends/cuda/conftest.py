"""csrc/cuda without a GPU: its kernels compiled as plain C++ over emulation/cuda_emulation.h, once a session."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for cuda_tree
from cuda_tree import SOURCES, TORCH, torch_headers  # noqa: E402

CAPACITY = 512  # of the draw's list: rows of a few thousand entries overflow it
# _FORTIFY_SOURCE takes a jump from one stack to another for an error.
FLAGS = [
    "-std=c++20", "-fPIC", "-U_FORTIFY_SOURCE", "-DENTRGI_EMULATION", f"-DENTRGI_DRAW_CAPACITY={CAPACITY}",
    "-Wno-unknown-pragmas",
    f"-I{SOURCES}", f"-I{HERE / 'emulation'}",
]  # fmt: skip


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels and their bindings for CPU tensors (torch.ops.entrgi_cuda), and the probes of emulation/probe.cpp."""
    if sys.platform != "linux":
        pytest.skip("the emulation switches stacks as Linux does")
    compiler = shutil.which(os.environ.get("CXX", "g++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    folder = tmp_path_factory.mktemp("emulation")
    optimised, plain = ["-O1"], ["-O0", *torch_headers()]
    units = [(source, optimised) for source in sorted(SOURCES.glob("*.cu"))]
    units += [(HERE / "emulation" / "probe.cpp", optimised), (SOURCES / "ops.cpp", plain)]
    running = []
    for source, flags in units:
        command = [compiler, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(folder / f"{source.name}.o")]
        running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for command, process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, f"{' '.join(command)}\n{errors}"
    library = folder / "entrgi_cuda_emulated.so"
    objects = [str(folder / f"{source.name}.o") for source, _ in units]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", str(library)], check=True)
    torch.ops.load_library(str(library))
    handle = ctypes.CDLL(str(library))
    handle.log_variate.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]
    handle.log_variate.restype = handle.value_of.restype = ctypes.c_float
    handle.key_of.argtypes, handle.key_of.restype = [ctypes.c_float, ctypes.c_int], ctypes.c_uint32
    handle.value_of.argtypes = [ctypes.c_uint32, ctypes.c_int]
    return handle
