"""The built extension on lesser machines: until cpuid has been asked, no instruction beyond SSE2 may run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entrgi_kernels.backends import native

_REASON = native.why_not(torch.device("cpu"), torch.float32)
pytestmark = [
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set"),
]

FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:$")
UNIT = re.compile(r"6entrgi\d+(avx2|avx512|avx512_bf16|amx)(?![a-z0-9_])")  # as g++ writes their namespaces
LATER = re.compile(
    r"\t(v(?!er[rw])\w+|ldtilecfg|tile\w+|tdp\w+|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|popcnt)\s"
    r"|%[yzt]mm|%k[0-7]"
)
CALL = re.compile(r"\t(?:call|j\w+)\s+[0-9a-f]+ <([^>+]+)")


def test_nothing_of_a_unit_runs_unasked() -> None:
    """Outside the units no later instruction, which an inline function shared with one or an initialiser would bring.

    No call into them either: only their tables lead there, and those are constants.
    """
    from entrgi_kernels import _C

    if not shutil.which("objdump"):
        pytest.skip("no objdump")
    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    name, units, faults = "", set(), []
    for line in run.stdout.splitlines():
        if found := FUNCTION.match(line):
            name = found[1]
            inside = UNIT.search(name)
            if inside:
                units.add(inside[1])
        elif name and not inside and LATER.search(line):
            faults.append(f"{name}: {line.strip()}")
        elif name and not inside and (call := CALL.search(line)) and UNIT.search(call[1]):
            faults.append(f"{name} calls {call[1]}")
    if not units:
        pytest.skip("the extension has no names of its functions, or one instruction set")
    assert units == set(native.build_info()["compiled_isas"]) - {"baseline"}
    assert not faults, "\n".join(faults[:20])


_PROBE = """
import torch
from entrgi_kernels.backends import native
assert native.why_not(torch.device("cpu"), torch.float32) is None
native.softmax_entropy(torch.randn(3, 50), 0.7)
print(*native.build_info()["supported_isas"])
"""


@pytest.mark.slow
def test_a_machine_without_avx512() -> None:
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator is None or native.build_info()["sanitizer"]:
        pytest.skip("no qemu-x86_64, or a build that it cannot run")
    root = Path(native.__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [emulator, "-cpu", "Haswell", sys.executable, "-c", _PROBE]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["avx2", "baseline"]
