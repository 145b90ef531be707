"""csrc/cuda through nvcc, without a GPU: every shipped architecture, and what the machine code holds."""

from __future__ import annotations

import functools
import subprocess
import sysconfig

import pytest
from cuda_tree import SOURCES, torch_headers

from benchmarks.tools import cuda_static
from benchmarks.tools.cuda_static import Kernel

MISSING = [name for name, path in (("nvcc", cuda_static.nvcc()), ("cuobjdump", cuda_static.disassembler())) if not path]
needs_nvcc = pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} on this machine")
compiled = functools.cache(cuda_static.compile_for)  # once a session


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", cuda_static.TARGETS)
def test_every_kernel_compiles_as_planned(target):
    """No local memory, registers within the planned occupancy, 16-byte loads."""
    kernels = compiled(target)
    faults = [f"{k.label}: {fault}" for k in kernels for fault in k.faults()]
    assert not faults, "\n".join(faults)
    names = {(k.name, k.dtype) for k in kernels}
    assert names == {
        (name, dtype)
        for name in ("statistics_kernel", "draw_kernel", "confidence_kernel", "entropy_backward_kernel")
        for dtype in ("float32", "bfloat16", "float16")
    }
    # Loads in flight: the statistics' loop is unrolled four times, and stays so.
    assert all(k.wide_loads >= 4 for k in kernels if k.name == "statistics_kernel")
    assert all(16 <= k.registers <= 255 for k in kernels)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", ["ops.cpp", "module.cpp", "hopper/ops.cpp"])
def test_bindings_compile_against_torch_and_cuda(source, tmp_path):
    """torch's headers for CUDA are in its CPU build, too, all but one that the build generates."""
    command = [
        cuda_static.nvcc(),
        "-std=c++20",
        "-O0",
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
        "-DENTRGI_HOPPER_CANDIDATES",
        "-Xcompiler=-fsyntax-only",
    ]
    headers = [*torch_headers(), "-isystem", sysconfig.get_path("include")]
    path = SOURCES / source
    done = subprocess.run(
        [*command, *headers, "-c", str(path), "-o", str(tmp_path / "out.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def kernel(**changes: object) -> Kernel:
    facts = dict(target="sm_90a", name="draw_kernel", dtype="float32", arguments=(512, 2, 8192, 0))
    numbers = dict(registers=64, stack=0, spilled=0, wide_loads=4, wide_stores=0, local=0)
    return Kernel(**{**facts, **numbers, **changes})


def test_faults_are_found():
    assert kernel().faults() == []
    assert "72 registers leave room for 1 blocks, planned 2" in kernel(registers=72).faults()[0]
    assert "65 registers" in kernel(registers=65).faults()[0]  # eight at a time
    for changes in ({"spilled": 8}, {"stack": 16}, {"local": 1}):
        assert "local memory" in kernel(**changes).faults()[0]
    assert kernel(wide_loads=0).faults() == ["no 16-byte loads"]
    assert kernel(name="entropy_backward_kernel").faults() == ["no 16-byte stores"]


LOG = """
ptxas info    : Compiling entry function '_ZN6entrgi4cuda11draw_kernelINS0_4bf16ELi512ELi2ELi8192ELb1EEEvNS0_7DrawJobE'
ptxas info    : Function properties for _ZN6entrgi4cuda11draw_kernelINS0_4bf16ELi512ELi2ELi8192ELb1EEEvNS0_7DrawJobE
    48 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers
"""
CODE = """
                Function : _ZN6entrgi4cuda17statistics_kernelIfLi256ELi4ELb0EEEvNS0_13StatisticsJobE
        /*0060*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0070*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0080*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*00b0*/                   STG.E.128 desc[UR4][R4.64], R8 ;
        /*00c0*/                   STL [R1+0x4], R8 ;
"""


def test_what_the_tools_say_is_read_right():
    symbol, numbers = next(iter(cuda_static.usage(LOG).items()))
    assert cuda_static.identify(symbol) == ("draw_kernel", "bfloat16", (512, 2, 8192, 1)) and numbers == (56, 48, 28)
    symbol, numbers = next(iter(cuda_static.accesses(CODE).items()))
    assert cuda_static.identify(symbol) == ("statistics_kernel", "float32", (256, 4, 0))
    assert numbers[1:] == (1, 1) and numbers[0] == 2
    with pytest.raises(ValueError, match="no kernel of entrgi::cuda"):
        cuda_static.identify("_Z5otherv")
    with pytest.raises(ValueError, match="no usage"):
        cuda_static.usage("Compiling entry function 'x' for")
