"""Tile sizes and engines per architecture and shape: frozen threshold tables, no tuning at run time.

An entry serves row counts up to its `most_rows`; the last entry of a list has none. `benchmarks/tools/tune.py` measures
candidates on a GPU and prints the tables. A comment beside an entry says what was measured. Entries of sm_90 in 16 bits
were timed on an H100 (benchmarks/results/tiles-nvidia-h100-80gb-hbm3.json). Every other was chosen WITHOUT A GPU, from
what ahead-of-time compilation shows (registers, shared memory, no spills) and from a count of bytes and operations.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton

from . import hopper

# By which a user gives Triton another ptxas.
ASSEMBLERS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
TRITON_RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])

# A row is read by this many programs at most. Merging kernels have as many lanes whatever the split, so that a new
# number of rows compiles nothing.
MOST_SPLITS = 128

# From so many rows on the compiled products (:mod:`.hopper`) serve: an end of an entry of the tables below.
LEAST_COMPILED = 33


@dataclass(frozen=True)
class RowConfig:
    """One program walks a slice of one row in tiles of `block` entries.

    Attributes:
        block: entries a tile. num_warps: warps a program.
        slice_least: a row is split over programs only into slices at least this long.
        programs_per_sm: programs that a launch aims at, per multiprocessor; rows are split until there are as many.
    """

    block: int
    num_warps: int
    slice_least: int
    programs_per_sm: int
    most_rows: int | None = None

    def splits(self, rows: int, length: int, sms: int) -> int:
        """How many programs share a row of `length` entries."""
        wanted = max(1, self.programs_per_sm * sms // max(1, rows))
        return max(1, min(wanted, length // self.slice_least, MOST_SPLITS))

    def slices(self, rows: int, length: int, sms: int) -> tuple[int, int]:
        """(entries a slice, slices a row); a slice is a whole number of tiles."""
        entries = -(-length // (self.splits(rows, length, sms) * self.block)) * self.block
        return entries, -(-length // entries)

    def lanes(self, width: int, aligned: bool) -> dict[str, int]:
        """How threads share a tile of entries of `width` bytes: LANES side by side, WIDTH neighbouring entries each.

        A thread loads 16 bytes at a time where rows are aligned, single entries where they are not.
        """
        entries = 16 // width if aligned else 1
        return dict(LANES=min(32 * self.num_warps, self.block // (2 * entries)), WIDTH=entries)


@dataclass(frozen=True)
class SampleConfig:
    """Candidates of the filtered draw.

    Attributes:
        collect: the pass that gathers candidates. race: the unfiltered exponential race.
        words: tiles after which the gathering threads agree on where in the list their candidates go.
        capacity_share: a row's list of candidates holds V / capacity_share entries, in equal shares for its slices, and
            `capacity_least` for each at the least.
        use: the share of the lists that the cut-off leaves to be filled, judged by a sample of `sample` entries of the
            row, at which `cut_warps` warps look.
        block: entries that the search reads once and keeps in registers.
        pivots: how many thresholds one pass tries. num_warps: of the search.
    """

    collect: RowConfig
    words: int
    race: RowConfig
    capacity_share: int
    capacity_least: int
    use: float
    sample: int
    cut_warps: int
    block: int
    pivots: int
    num_warps: int


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of a product over the vocabulary.

    Attributes:
        block_n, block_v, block_d: tile over rows, vocabulary, embedding width (one of them is the summed axis).
        loads: "pointer" (each thread copies its own entries) or "descriptor" (the copy engine, TMA, brings whole tiles:
            sm_90 and later), in the fused engine. Tensors that :func:`.launch.bulk` refuses are read by pointers.
        parts: 1, 2, 4, 8 or 16 parts in which the backward's epilogue works through its tile, for registers' sake
            (twice as many, 16 at the most, where logits or moments are wider than the operands).
        engine: "fused" (own kernel) or "chunked" (probabilities or products of a chunk in memory, cuBLAS between).
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    engine: str = "fused"
    loads: str = "pointer"
    parts: int = 1
    most_rows: int | None = None


@dataclass(frozen=True)
class Architecture:
    """Everything chosen for one architecture. GEMM tables are by operand width in bytes: 2 (bf16, fp16) or 4 (fp32).

    `unaligned` is the fused tile of both products where a row does not start on a multiple of 16 entries (V = 50257,
    say): loads are then of single entries, pass through registers, and the tables' tiles would spill. `bulk` says that
    an engine copies whole tiles (TMA): without it entries with descriptors are served by pointers.
    """

    name: str
    statistics: tuple[RowConfig, ...]
    sample: SampleConfig
    confidence: RowConfig
    elementwise: RowConfig
    forward: dict[int, tuple[GemmConfig, ...]]
    backward: dict[int, tuple[GemmConfig, ...]]
    table: dict[int, tuple[GemmConfig, ...]]
    unaligned: dict[int, GemmConfig] = field(default_factory=dict)
    bulk: bool = False
    merge_block: tuple[int, int] = (4, 256)
    spare_share: float = 0.1
    spare_least_bytes: int = 1 << 20

    def spare_bytes(self, logits: torch.Tensor, d: int, width: int) -> int:
        """Bytes that a product over `logits` [N, V] may take for partial sums or chunks.

        A step may take a tenth of the logits' bytes beyond logits and moments. The soft embedding [N, d] in float32 and
        the blend, of `width` bytes an entry, are part of that and live as long. A few rows may take a megabyte.
        """
        n, v = logits.shape
        held = n * d * (4 + width)
        return max(self.spare_least_bytes, int(self.spare_share * n * v * logits.element_size()) - held)


def pick(entries, rows: int):
    """The first entry that serves `rows` rows."""
    for entry in entries:
        if entry.most_rows is None or rows <= entry.most_rows:
            return entry
    return entries[-1]


def pick_product(
    architecture: Architecture, family: str, width: int, rows: int, aligned: bool, bulk: bool
) -> GemmConfig:
    """:func:`pick` for the "forward" or "backward" product of operands of `width` bytes.

    In the fused engine the architecture's small tile is taken where rows are not `aligned`, and an entry with
    descriptors becomes one with pointers where tiles cannot be copied in `bulk`.
    """
    entry = pick(getattr(architecture, family)[width], rows)
    if entry.engine != "fused":
        return entry
    if not aligned:
        entry = architecture.unaligned.get(width, entry)
    if entry.loads == "descriptor" and not (bulk and architecture.bulk):
        return replace(entry, loads="pointer")
    return entry


# Some eight programs for each place on the chip, of slices of 12,288 entries or more: with one program a row N = 1,024
# took as long as N = 2,048.
_ROWS: dict[str, Any] = dict(
    # 56 registers, so that nine programs share a multiprocessor.
    statistics=(RowConfig(4096, 4, 4096, 8, most_rows=32), RowConfig(4096, 4, 12288, 64)),
    # H100: filtered draw with its statistics 3.3, 2.9, 2.7, 2.6 reads of phi at N 512, 1024, 2048, 4096.
    sample=SampleConfig(
        collect=RowConfig(4096, 4, 12288, 64),
        words=4,
        race=RowConfig(2048, 8, 16384, 16),
        capacity_share=40,
        capacity_least=256,
        use=0.65,
        sample=4096,
        cut_warps=4,
        block=1024,
        pivots=4,
        num_warps=8,
    ),
    confidence=RowConfig(2048, 4, 16384, 8),
    elementwise=RowConfig(1024, 4, 1024, 4),
)

# Forward: the summed axis is V. Rows decide: 16 rows and fewer fill one small tile and the kernel streams E once;
# from 1,024 rows p recomputed for every block of D costs more exponentials than writing it once costs bytes.
_FORWARD_16_BIT = (
    GemmConfig(16, 128, 64, 4, 4, most_rows=32),
    # Narrow, for a few partial sums are all that the memory allows: 96 programs at N = 64, D = 1024.
    GemmConfig(64, 64, 64, 4, 4, most_rows=64),
    GemmConfig(64, 64, 128, 4, 3, most_rows=256),
    GemmConfig(128, 64, 128, 8, 3, most_rows=1023),
    GemmConfig(128, 64, 128, 8, 3, engine="chunked"),
)
_FORWARD_32_BIT = (
    GemmConfig(16, 64, 64, 4, 3, most_rows=32),
    GemmConfig(64, 32, 64, 4, 3),
)
# Backward: the summed axis is D; V is an output axis, and Adam's traffic is what a second program on the same
# multiprocessor has to hide, so that tiles stay at half of the shared memory. At the tensor cores' rate 128 x 128 x 64
# reads 64 bytes a cycle from L2, 128 x 256 x 64 reads 48, 64 x 256 x 64 reads 80; L2 gives some 40.
_BACKWARD_16_BIT = (
    GemmConfig(16, 128, 64, 4, 4, most_rows=32),
    GemmConfig(64, 128, 64, 4, 3, parts=4, most_rows=256),
    GemmConfig(128, 128, 64, 8, 3, parts=4),
)
# With the copy engine (sm_90 and later); not measured on sm_100.
_FORWARD_16_BIT_BULK = (
    GemmConfig(16, 128, 64, 4, 4, loads="descriptor", most_rows=32),
    GemmConfig(64, 64, 64, 4, 4, loads="descriptor", most_rows=64),
    GemmConfig(64, 64, 128, 4, 4, loads="descriptor", most_rows=256),
    # Half the exponentials of 128 columns; one program a multiprocessor (201 registers).
    GemmConfig(128, 64, 256, 8, 3, loads="descriptor", most_rows=1023),
    GemmConfig(128, 64, 128, 8, 3, engine="chunked"),
)
_BACKWARD_16_BIT_BULK = (
    GemmConfig(16, 128, 64, 4, 4, loads="descriptor", most_rows=32),
    GemmConfig(64, 128, 64, 4, 3, loads="descriptor", parts=4, most_rows=256),
    # 127 registers and 96 KiB: two programs share a multiprocessor, one's Adam traffic under the other's product.
    GemmConfig(128, 128, 64, 8, 3, loads="descriptor", parts=8),
)
_STATISTICS_SM_90 = (
    _ROWS["statistics"][0],
    # 81, 90, 94, 97% of copy bandwidth at N 512, 1024, 2048, 4096 (the kernel, two temperatures); tiles of 4,096 with
    # slices from 12,288 on 75, 81, 87, 90%.
    RowConfig(2048, 4, 8192, 64),
)
# H100, V 151,936, torch 2.11.0, Triton 3.6.0; milliseconds at N 64, 512, 1024, 2048, 4096.
_FORWARD_16_BIT_SM_90 = (
    GemmConfig(16, 128, 64, 4, 4, loads="descriptor", most_rows=32),
    # 0.20 at 64; 64 x 64 x 64 takes 0.30.
    GemmConfig(64, 128, 64, 4, 4, loads="descriptor", most_rows=64),
    # 0.32, 0.52, 1.49, 2.81, 7.69; 128 x 64 x 256 takes 0.63, 1.47, 2.91, 7.32 from 512 on.
    GemmConfig(64, 64, 256, 4, 3, loads="descriptor", most_rows=1535),
    # 0.87, 1.32, 1.79, 2.29, 5.33.
    GemmConfig(128, 64, 128, 8, 3, engine="chunked"),
)
_BACKWARD_16_BIT_SM_90 = (
    GemmConfig(16, 128, 64, 4, 4, loads="descriptor", most_rows=32),
    # 0.25 at 64; in quarters 0.29.
    GemmConfig(64, 128, 64, 4, 3, loads="descriptor", parts=8, most_rows=256),
    # 0.84, 2.12, 3.67, 8.02 from 512 on; two programs of 128 x 128 x 64 take 0.90, 2.19, 3.80, 9.01.
    GemmConfig(128, 256, 64, 8, 4, loads="descriptor", parts=16),
)
_BACKWARD_32_BIT = (
    GemmConfig(16, 64, 64, 4, 3, most_rows=32),
    GemmConfig(64, 64, 32, 4, 3),
)
_TABLE_16_BIT = (GemmConfig(64, 128, 64, 8, 3),)
_TABLE_32_BIT = (GemmConfig(32, 64, 64, 4, 3),)

_UNALIGNED = {2: GemmConfig(64, 64, 32, 8, 2), 4: GemmConfig(64, 32, 32, 8, 2)}

_SM_80 = Architecture(
    "sm_80",
    # With the other tile the search of a threshold keeps 8 bytes on the stack, under Triton 3.6 and 3.7.
    **_ROWS | dict(sample=replace(_ROWS["sample"], block=512, num_warps=4)),
    forward={2: _FORWARD_16_BIT, 4: _FORWARD_32_BIT},
    backward={2: _BACKWARD_16_BIT, 4: _BACKWARD_32_BIT},
    table={2: _TABLE_16_BIT, 4: _TABLE_32_BIT},
    unaligned=_UNALIGNED,
)
_SM_90 = Architecture(
    "sm_90",
    **_ROWS | dict(statistics=_STATISTICS_SM_90),
    forward={2: _FORWARD_16_BIT_SM_90, 4: _FORWARD_32_BIT},
    backward={2: _BACKWARD_16_BIT_SM_90, 4: _BACKWARD_32_BIT},
    table={2: _TABLE_16_BIT, 4: _TABLE_32_BIT},
    unaligned=_UNALIGNED,
    bulk=True,
)
_SM_100 = Architecture(
    "sm_100",
    **_ROWS,
    forward={2: _FORWARD_16_BIT_BULK, 4: _FORWARD_32_BIT},
    backward={2: _BACKWARD_16_BIT_BULK, 4: _BACKWARD_32_BIT},
    table={2: _TABLE_16_BIT, 4: _TABLE_32_BIT},
    unaligned=_UNALIGNED,
    bulk=True,
)

# The interpreter runs one program at a time on a CPU; its tiles are small so that toy shapes reach every branch: split
# rows, several tiles, overflowing lists of candidates, chunks. `most_rows` picks the engine so that tests see both.
_INTERPRETER = Architecture(
    "interpreter",
    statistics=(RowConfig(128, 1, 128, 1),),
    sample=SampleConfig(
        collect=RowConfig(128, 1, 128, 1),
        words=2,
        race=RowConfig(128, 1, 128, 1),
        capacity_share=4,
        capacity_least=32,
        use=0.5,
        sample=64,
        cut_warps=1,
        block=64,
        pivots=4,
        num_warps=1,
    ),
    confidence=RowConfig(128, 1, 128, 1),
    elementwise=RowConfig(128, 1, 64, 1),
    forward={
        s: (
            GemmConfig(16, 32, 16, 1, 1, most_rows=4),
            GemmConfig(16, 32, 16, 1, 1, loads="descriptor", most_rows=20),
            GemmConfig(16, 32, 16, 1, 1, "chunked"),
        )
        for s in (2, 4)
    },
    backward={
        s: (
            GemmConfig(16, 32, 16, 1, 1, most_rows=4),
            GemmConfig(16, 32, 16, 1, 1, loads="descriptor", parts=2, most_rows=8),
            GemmConfig(16, 64, 16, 1, 1, loads="descriptor", parts=4, most_rows=14),
            GemmConfig(16, 64, 16, 1, 1, parts=8, most_rows=20),
            GemmConfig(16, 32, 16, 1, 1, "chunked"),
        )
        for s in (2, 4)
    },
    table={s: (GemmConfig(16, 32, 16, 1, 1),) for s in (2, 4)},
    bulk=True,
    merge_block=(2, 16),
    spare_least_bytes=1 << 12,
)

ARCHITECTURES = {a.name: a for a in (_SM_80, _SM_90, _SM_100, _INTERPRETER)}
_BY_MAJOR = {8: _SM_80, 9: _SM_90, 10: _SM_100, 12: _SM_80}


@dataclass(frozen=True)
class Target:
    """An architecture's tables, the number of multiprocessors, and how float32 products are formed.

    `precision` is Triton's input_precision of float32 products: three TF32 products ("tf32x3": about 2^-22 relative,
    on tensor cores) on NVIDIA, plain float32 ("ieee") elsewhere. A single TF32 product would miss the error bound.
    Triton 3.8 takes more shared memory for three (triton-lang/triton #11526).
    `waits`: products whose left operand is computed in registers end before it is computed anew. On Hopper Triton 3.6
    to 3.8 overwrite it while the product still reads it (triton-lang/triton #9433, #9514, #9530, #11781; an H100 gave
    wrong sums in 250 of 250 launches); 3.9 does not. `compiled`: the extension has this GPU's products
    (:mod:`.hopper`).
    """

    architecture: Architecture
    sms: int
    precision: str
    waits: bool = False
    compiled: bool = False


def target_of(major: int, sms: int, hip: bool = False) -> Target:
    """The tables for a GPU: `major` of its compute capability (not looked at on ROCm), and its multiprocessors."""
    if hip:
        return Target(_SM_80, sms, "ieee")
    # Triton 3.9 and ptxas 13.3, which it brings, are the cure together; nobody knows what another assembler does.
    unsafe = TRITON_RELEASE < (3, 9) or any(os.environ.get(name) for name in ASSEMBLERS)
    return Target(_BY_MAJOR.get(major, _SM_80), sms, "tf32x3", waits=major == 9 and unsafe)


@functools.cache
def _of_cuda(index: int | None) -> Target:
    index = torch.cuda.current_device() if index is None else index
    properties = torch.cuda.get_device_properties(index)
    found = target_of(properties.major, properties.multi_processor_count, torch.version.hip is not None)
    return replace(found, compiled=hopper.ready(torch.device("cuda", index)))


# Tests and the ahead-of-time gate put a target here to be served as if on that machine.
override: Target | None = None


def target(device: torch.device) -> Target:
    """The tables for a device; the interpreter's for a CPU."""
    if override is not None:
        return override
    return _of_cuda(device.index) if device.type == "cuda" else Target(_INTERPRETER, 8, "ieee")
