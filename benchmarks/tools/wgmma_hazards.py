"""Register operands of running products that are written to, on Hopper: `python -m benchmarks.tools.wgmma_hazards`.

A wgmma whose left operand is in registers (HGMMA R.., R.., gdesc[..]) reads them until the wait that retires its group
(WARPGROUP.DEPBAR.LE gsb0). Triton 3.6 to 3.8 with ptxas below 13.3 write them before (triton-lang/triton #9433, #9514,
#9530, #11781): wrong sums, seen on an H100 in every launch of one tile. Here the steady iteration of each loop is
walked with the groups in flight, and every write to such a register is told. No GPU is needed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

# Instructions that write no vector register.
_SILENT = (
    *("ST", "BAR", "HGMMA", "WARP", "BRA", "SYNCS", "UTMA", "MEMBAR", "FENCE", "RED", "ISETP", "FSETP", "R2UR", "VOTE"),
    *("EXIT", "U", "S2UR", "NOP", "DEPBAR", "CCTL", "ERRBAR", "CGAERRBAR"),
)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);\s+/\* 0x")
_PRODUCT = re.compile(r"HGMMA\S*\s+R\d+,\s*R(\d+)")
_WRITE = re.compile(r"\S+\s+(?:P\w+,\s*)?R(\d+)")


def _operand(text: str) -> set[int]:
    """The registers that a product reads as its left operand: four, of 16-bit entries."""
    found = _PRODUCT.search(text)
    return set(range(int(found[1]), int(found[1]) + 4)) if found else set()


def _written(text: str) -> set[int]:
    text = re.sub(r"^@!?U?P\w+\s+", "", text)
    name = text.split()[0]
    found = None if name.startswith(_SILENT) else _WRITE.match(text)
    if found is None:
        return set()
    width = 1
    if name.startswith("LDSM"):
        width = 4 if name.endswith(".4") else 2 if name.endswith(".2") else 1
    elif name.startswith(("LDG", "LDS", "LDC", "LD.")):
        width = 4 if ".128" in name else 2 if ".64" in name else 1
    elif "WIDE" in name or name.startswith(("DADD", "DMUL", "DFMA")):
        width = 2
    return set(range(int(found[1]), int(found[1]) + width))


def hazards(sass: str) -> list[str] | None:
    """The offending instructions of one kernel, as `cuobjdump -sass` prints it; None where no product has a register
    operand.

    Raises:
        ValueError: products outside of any loop, which this does not follow.
    """
    code = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    products = [place for place, (_, text) in enumerate(code) if "HGMMA" in text]
    if not any(_operand(code[place][1]) for place in products):
        return None
    places = {address: place for place, (address, _) in enumerate(code)}
    for end in range(products[-1], len(code)):
        jump = re.search(r"BRA\S*\s+.*?(0x[0-9a-f]+)", code[end][1])
        if jump and int(jump[1], 16) <= code[products[0]][0]:
            body = code[places[int(jump[1], 16)] : end + 1]
            break
    else:
        raise ValueError("no loop was found around the products")
    flight: list[list[set[int]]] = []
    group: list[set[int]] = []
    found = []
    for turn in range(3):  # the third is steady
        for _, text in body:
            if "HGMMA" in text:
                group.append(_operand(text))
                if "gsb0" in text:
                    flight.append(group)
                    group = []
            elif "DEPBAR.LE gsb0" in text:
                left = int(text.split(",")[-1], 16)
                flight = flight[-left:] if left else []
            touched = _written(text)
            if turn == 2 and any(registers & touched for some in [*flight, group] for registers in some):
                found.append(text)
    return found


def of_cubin(cubin: bytes) -> dict[str, list[str] | None]:
    """:func:`hazards` of every kernel in a binary, by the kernel's name."""
    from benchmarks.tools import gate

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([gate.tool("cuobjdump"), "-sass", str(path)], capture_output=True, text=True, check=True)
    parts = done.stdout.split("Function : ")[1:]
    return {part.split(None, 1)[0]: hazards(part) for part in parts}


def of_triton(only: str = "") -> Iterator[tuple[str, list[str]]]:
    """(launch, its hazards) of every sm_90 launch whose label matches and that has products of registers."""
    from benchmarks.tools import gate
    from entrgi_kernels.backends.triton import aot

    machine = gate.MACHINES["sm_90"]
    for item in gate.jobs("sm_90"):
        if re.search(only, item.label):
            (found,) = of_cubin(aot.build(machine.gpu, item).asm["cubin"]).values()
            if found is not None:
                yield f"{item.label} {item.num_warps} warps x {item.num_stages} stages", found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the count of each launch; exit status 1 where there is a hazard."""
    import triton

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.wgmma_hazards", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", default="", help="regular expression on the launch's label")
    worst = 0
    print(f"triton {triton.__version__}")
    for label, found in of_triton(parser.parse_args(argv).only):
        worst = max(worst, len(found))
        print(f"{len(found):4d}  {label}", flush=True)
    print(f"most in one launch: {worst}")
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
