"""Every launch of the Triton backend compiles for the shipped architectures, within registers and shared memory."""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process: nothing to compile", allow_module_level=True)

from benchmarks.tools import gate, sass  # noqa: E402
from entrgi_kernels.backends.triton import aot, config  # noqa: E402


@pytest.mark.parametrize("target", gate.SHIPPED)
def test_launches_cover_every_kernel_and_every_tile(target):
    """The gate is worth what it compiles: all kernels, and each tile that a table can choose."""
    found = gate.jobs(target)
    files = Path(aot.__file__).parent.glob("*.py")
    written = {name for file in files for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert len(written) > 10 and {item.kernel for item in found} == written
    tables = config.ARCHITECTURES[target]
    for kernel, module, entries in (
        ("_forward_kernel", "soft_embedding", tables.forward),
        ("_backward_kernel", "guidance_update", tables.backward),
        ("_table_kernel", "soft_embedding", tables.table),
    ):
        compiled = {
            (i.tile["BLOCK_N"], i.tile["BLOCK_V"], i.tile["BLOCK_D"], i.num_warps, i.num_stages)
            for i in found
            if (i.kernel, i.module) == (kernel, module)
        }
        for entry in (e for width in entries.values() for e in width if e.engine == "fused"):
            assert (entry.block_n, entry.block_v, entry.block_d, entry.num_warps, entry.num_stages) in compiled


# Spills are judged on the releases that users get: torch 2.11's, and the lock's. On others they are told.
JUDGED = {(3, 6), (3, 7)}


def failures(made, spilled=0):
    """What the gate holds against launches, one a line; `spilled` bytes are let pass, on other releases any."""
    if config.TRITON_RELEASE not in JUDGED:
        told = [f"{r.target} {r.launch.label}: {r.spill_bytes} bytes" for r in made if r.spill_bytes > spilled]
        if told:
            warnings.warn(
                f"spills on a Triton that is not judged ({triton.__version__}): " + "; ".join(told), stacklevel=2
            )
        spilled = math.inf
    return "\n".join(
        f"{r.target} {r.launch.label}: {r.error or f'{r.spill_bytes} bytes spilled, {r.shared_bytes} shared'}"
        for r in made
        if r.error or r.spill_bytes > spilled or r.shared_bytes > r.machine.shared_limit
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", gate.SHIPPED)
def test_every_launch_compiles_and_spills_nothing(target, deep):
    """All launches on Hopper; on the others one of each kernel, and all with --deep."""
    if deep or target == "sm_90":
        made = gate.reports([target])
        assert len(made) > 100
    else:
        one = {item.kernel: item for item in gate.jobs(target)}
        made = gate.compile_all([(target, gate.MACHINES[target], item) for item in one.values()], 2)
        assert len(made) > 10
    assert failures(made) == ""
    # ptxas was read, not assumed.
    assert all(8 <= r.registers <= 255 for r in made)


@pytest.mark.slow
def test_every_tile_fits_the_machines_that_borrow_the_tables(deep):
    """Consumer and workstation GPUs have half of the shared memory; AMD's have another compiler. None is measured."""
    if not deep:
        pytest.skip("with --deep (make test-all) only")
    made = gate.reports(gate.FALLBACK)
    assert {r.target for r in made} == set(gate.FALLBACK)
    # The draw's search keeps 16 bytes on sm_86, sm_89 and sm_120.
    assert failures(made, spilled=16) == ""
    assert all(8 <= r.registers <= 512 for r in made)


def test_float32_logits_beside_a_narrow_table_fit_half_of_the_shared_memory():
    """Their tiles are twice as large as those that the tables were made for."""
    machine = gate.MACHINES["sm_86"]
    found = aot.launches(machine, [(n, gate.VOCABULARY, 1024, torch.float32, torch.bfloat16) for n in (64, 512)])
    products = [i for i in found if i.kernel == "_forward_kernel" and i.dtypes == "fp32/bf16"]
    assert {i.tile["BLOCK_N"] for i in products} == {64, 128}
    assert failures([gate.compile_launch("sm_86", machine, item) for item in products]) == ""


def test_spills_are_seen():
    """The gate can fail: a tile far too large for its warps spills, and is reported so."""
    found = gate.jobs("sm_80")
    item = next(i for i in found if i.kernel == "_forward_kernel" and i.tile["BLOCK_N"] == 128)
    place = [name for name, _ in item.signature].index("BLOCK_D")
    greedy = replace(
        item,
        options=tuple((dict(item.options) | {"num_warps": 4}).items()),
        constants=tuple((where, 256 if where == place else value) for where, value in item.constants),
    )
    report = gate.compile_launch("sm_80", gate.MACHINES["sm_80"], greedy)
    assert not report.passed
    assert report.spill_bytes > 0


@pytest.mark.slow
def test_products_on_hopper_copy_in_bulk_and_keep_the_tensor_cores_busy():
    """The copy engine brings the tiles; a warp group's product is still running when the next tile is waited for."""
    machine = gate.MACHINES["sm_90"]
    found = aot.launches(machine, [(512, gate.VOCABULARY, 1024, torch.bfloat16, torch.bfloat16)])
    moments = [i for i in found if i.kernel == "_backward_kernel" and i.tile.get("READS") and i.tile.get("WRITES")]
    for item in (next(i for i in found if i.kernel == "_forward_kernel"), moments[0]):
        ptx = aot.build(machine.gpu, item).asm["ptx"]
        assert "cp.async.bulk.tensor.2d" in ptx and "cp.async.cg" not in ptx
        assert "wgmma.mma_async" in ptx and "mma.sync" not in ptx
        if item.kernel == "_backward_kernel" or not machine.tables.waits:
            assert re.search(r"wgmma.wait_group.sync.aligned [1-9];", ptx)
        # The left operand goes to the product from where it was copied to, or from registers: not by way of shared
        # memory a second time.
        assert "st.shared" not in ptx[: ptx.index("wgmma.mma_async")]


def test_loops_are_counted_in_machine_code():
    """Row statistics at two temperatures: two exponentials an entry, and two for rescaling once a tile."""
    machine = gate.MACHINES["sm_90"]
    found = aot.launches(machine, [(512, gate.VOCABULARY, 1024, torch.bfloat16, torch.bfloat16)])
    item = next(i for i in found if i.kernel == "_statistics_kernel" and i.tile["SECOND"])
    main, *_ = sass.loops(sass.disassemble(aot.build(machine.gpu, item).asm["cubin"]))
    entries = item.tile["BLOCK_V"] // (32 * item.num_warps)
    # Under Triton 3.6 two more, once a tile.
    assert 2 * entries + 2 <= main.names["MUFU"] <= 2 * entries + 4 and main.counts["mufu"] == main.names["MUFU"]
    assert main.names["LDG"] == entries // 8  # 16 bytes each
    assert main.counts["issue"] == sum(main.names.values()) < 15 * entries
    assert main.bound == "mufu" and main.clocks == main.counts["mufu"] / 16


def test_the_lock_holds_a_release_whose_spills_are_judged():
    for lock in ("requirements.lock", "requirements-oldest.lock"):
        text = (Path(__file__).parents[2] / lock).read_text(encoding="utf-8")
        (release,) = set(re.findall(r"^triton==(\d+)\.(\d+)", text, re.MULTILINE))
        assert tuple(map(int, release)) in JUDGED, lock
