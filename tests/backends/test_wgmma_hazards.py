"""Hopper's machine code: no register operand of a running product is written to, by Triton or by nvcc."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process: nothing to compile", allow_module_level=True)

from benchmarks.tools import cuda_static, gate, wgmma_hazards  # noqa: E402
from entrgi_kernels.backends import triton as kernels  # noqa: E402
from entrgi_kernels.backends.triton import aot, config  # noqa: E402

HOPPER = cuda_static.ROOT / "csrc" / "cuda" / "hopper"
needs_nvcc = pytest.mark.skipif(cuda_static.nvcc() is None, reason="no nvcc on this machine")

LOOP = """
        /*0100*/                   MUFU.EX2 R8, R20 ;    /* 0x00 */
        /*0110*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24, gsb0 ;    /* 0x00 */
        /*0120*/                   {first} ;    /* 0x00 */
        /*0130*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;    /* 0x00 */
        /*0140*/                   {second} ;    /* 0x00 */
        /*0150*/              @!P0 BRA 0x100 ;    /* 0x00 */
"""


@pytest.mark.parametrize(
    ("first", "left", "second", "number"),
    [
        ("FADD R4, R1, R2", "0x0", "FADD R4, R1, R2", 1),  # before the wait, not after it
        ("FADD R8, R1, R2", "0x0", "FADD R7, R1, R2", 0),
        ("FADD R8, R1, R2", "0x1", "FADD R7, R1, R2", 1),  # one group may still run
        ("LDS.128 R4, [R1]", "0x0", "NOP", 1),
        ("LDS.64 R2, [R1]", "0x0", "NOP", 0),
        ("@P1 LDSM.16.M88.4 R1, [R9]", "0x0", "NOP", 1),
        ("STS.128 [R4], R8", "0x0", "NOP", 0),
    ],
)
def test_writes_before_the_wait_are_counted(first, left, second, number):
    found = wgmma_hazards.hazards(LOOP.format(first=first, left=left, second=second))
    assert found is not None and len(found) == number


def test_products_from_shared_memory_alone_have_none():
    code = LOOP.format(first="NOP", left="0x0", second="NOP").replace("R24, R4, gdesc", "R24, gdesc")
    assert wgmma_hazards.hazards(code) is None
    with pytest.raises(ValueError, match="no loop"):
        wgmma_hazards.hazards(LOOP.format(first="NOP", left="0x0", second="NOP").replace("BRA 0x100", "EXIT"))


@pytest.mark.slow
def test_triton_writes_no_operand_of_a_running_product():
    counts = {
        label: len(found) for label, found in wgmma_hazards.of_triton("forward_kernel|backward_kernel|table_kernel")
    }
    assert any("table_kernel" in label for label in counts) and any("forward" in label for label in counts)
    assert max(counts.values()) == 0, counts


def test_another_assembler_is_not_trusted(monkeypatch):
    for name in config.ASSEMBLERS:
        monkeypatch.delenv(name, raising=False)
    assert config.target_of(9, 132).waits == (config.TRITON_RELEASE < (3, 9))
    for name in config.ASSEMBLERS:
        with monkeypatch.context() as given:
            given.setenv(name, "/somewhere/ptxas")
            assert config.target_of(9, 132).waits
            assert not config.target_of(10, 148).waits and not config.target_of(8, 108).waits


@pytest.mark.skipif(config.TRITON_RELEASE >= (3, 9), reason="this Triton waits by itself")
def test_without_the_wait_it_does():
    machine, found = gate.MACHINES["sm_90"], []
    sizes = [(512, 151_936), (151_936, 1024)]
    logits, table = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    with aot.recording(machine, found.append):
        config.override = replace(machine.tables, waits=False)
        kernels.soft_embedding(logits, table, 0.7)
    (product,) = (item for item in found if item.kernel == "_forward_kernel")
    (hazards,) = wgmma_hazards.of_cubin(aot.build(machine.gpu, product).asm["cubin"]).values()
    assert hazards


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "update", "candidates"])
def test_compiled_products_spill_nothing_and_keep_their_products_running(name, tmp_path):
    # With the host's part: nvcc writes launches for fewer kinds of template arguments than it compiles kernels for.
    binary = tmp_path / f"{name}.o"
    done = subprocess.run(
        [cuda_static.nvcc(), *cuda_static.FLAGS, "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-c"]
        + ["-DENTRGI_HOPPER_CANDIDATES", str(HOPPER / f"{name}.cu"), "-o", str(binary)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr  # ptxas says so where it makes products wait for each other
    usage = cuda_static.usage(done.stderr)
    # With fewer registers at first than a block's threads could have, those who ask for more would wait for ever.
    first = 65536 // (3 * 128 if name == "forward" else 4 * 128) // 8 * 8
    assert usage and set(usage.values()) == {(first, 0, 0)}, usage
    found = wgmma_hazards.of_cubin(binary.read_bytes())
    assert len(found) == len(usage)
    # The update's operands both come from shared memory.
    wanted = [] if name == "forward" else None
    assert all(hazards == wanted for hazards in found.values()), found


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100a"])
def test_on_other_architectures_they_are_empty(target, tmp_path):
    for source in HOPPER.glob("*.cu"):
        done = subprocess.run(
            [cuda_static.nvcc(), *cuda_static.FLAGS, f"-arch={target}", "-cubin", str(source)]
            + ["-o", str(tmp_path / "x.cubin")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found = wgmma_hazards.of_cubin((tmp_path / "x.cubin").read_bytes())
        # The candidates are not even that where nobody asks for them.
        assert set(found.values()) == ({None} if source.stem != "candidates" else set())
