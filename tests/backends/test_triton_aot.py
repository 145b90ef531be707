"""Every launch of the Triton backend compiles for the shipped architectures, within registers and shared memory."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process: nothing to compile", allow_module_level=True)

from entrgi_kernels.backends.triton import aot, config  # noqa: E402

TARGETS = tuple(aot.CAPABILITY)


@pytest.mark.parametrize("target", TARGETS)
def test_launches_cover_every_kernel_and_every_tile(target):
    """The gate is worth what it compiles: all kernels, and each tile that a table can choose."""
    found = aot.launches(target, thorough=False)
    kernels = {item.kernel for item in found}
    assert {"_statistics_kernel", "_collect_kernel", "_pick_kernel", "_race_kernel", "_forward_kernel"} <= kernels
    assert {"_backward_kernel", "_table_kernel", "_probability_kernel", "_update_kernel"} <= kernels
    tables = config.ARCHITECTURES[target]
    for kernel, entries in (("_forward_kernel", tables.forward), ("_backward_kernel", tables.backward)):
        compiled = {
            (c["BLOCK_N"], c["BLOCK_V"], c["BLOCK_D"], item.num_warps, item.num_stages)
            for item in found
            if item.kernel == kernel and item.module in ("soft_embedding", "guidance_update")
            for c in [dict(item.constants)]
        }
        for entry in (e for width in entries.values() for e in width if e.engine == "fused"):
            assert (entry.block_n, entry.block_v, entry.block_d, entry.num_warps, entry.num_stages) in compiled


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles_and_spills_nothing(target):
    made = aot.reports([target])
    assert len(made) > 40
    failed = [
        f"{r.launch.label}: {r.error or f'{r.spill_bytes} bytes spilled, {r.shared_bytes} shared'}"
        for r in made
        if not r.passed
    ]
    assert not failed, "\n".join(failed)
    # ptxas was read, not assumed.
    assert all(8 <= r.registers <= 255 for r in made)


def test_spills_are_seen():
    """The gate can fail: a tile far too large for its warps spills, and is reported so."""
    found = aot.launches("sm_80", thorough=False)
    item = next(i for i in found if i.kernel == "_forward_kernel" and dict(i.constants)["BLOCK_N"] == 128)
    greedy = replace(
        item,
        num_warps=4,
        constants=tuple((name, 256 if name == "BLOCK_D" else value) for name, value in item.constants),
    )
    report = aot.compile_launch("sm_80", greedy)
    assert not report.passed
    assert report.spill_bytes > 0
