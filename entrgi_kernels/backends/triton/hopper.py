"""The third engine of both products: compiled CUDA for Hopper (csrc/cuda/hopper), where the extension has it.

Triton's own products reach 50 to 55% of cuBLAS's rate on an H100. Below Triton 3.9 one with a computed left operand may
not run while the next operand is formed, and none has its epilogue under the next tile's product. These do both.
It serves bfloat16 logits, tables and gradients whose rows start on 16 bytes, on compute capability 9.0.
"""

from __future__ import annotations

import functools

import torch

from .. import extension
from .launch import bulk, cdiv

_ROWS, _COLUMNS, _DEPTH = 128, 256, 64  # of a block's tile in the forward product
# Blocks that run at once, as a share of the multiprocessors: a cluster lies within one group of them.
_CLUSTERS = {1: 1.0, 2: 1.0, 4: 0.9, 8: 0.8}


@functools.cache
def ready(device: torch.device) -> bool:
    """Whether this GPU and the extension have the compiled products."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and not isinstance(extension.load("entrgi_kernels._C_cuda"), str)
        and hasattr(torch.ops.entrgi_cuda, "hopper_forward_")
        and torch.cuda.get_device_capability(device) == (9, 0)
        and torch.ops.entrgi_cuda.hopper_compiled()
    )


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the products take these [N, X] matrices: bfloat16 of widths by 8, rows apart and on 16 bytes."""
    return all(tensor.dtype == torch.bfloat16 and tensor.shape[1] % 8 == 0 for tensor in tensors) and bulk(*tensors)


def serves_moments(*moments: torch.Tensor) -> bool:
    """Whether the update takes these moments [N, V]: both bfloat16 or both float32, rows apart and on 16 bytes."""
    return (
        len({moment.dtype for moment in moments}) == 1
        and moments[0].dtype in (torch.bfloat16, torch.float32)
        and bulk(*moments)
    )


@functools.lru_cache(maxsize=1024)
def plan(n: int, v: int, d: int, most: int, sms: int) -> tuple[int, int, int]:
    """(parts, slices, entries a slice) of the forward product.

    A part is written to memory (`most` of them may be); its slices are added within a cluster. Chosen is what leaves
    the fewest steps to the busiest multiprocessor, and of equals that with the smallest clusters.
    """
    tiles, blocks = cdiv(n, _ROWS) * cdiv(d, _COLUMNS), cdiv(v, _DEPTH)
    best = None
    for slices, share in _CLUSTERS.items():
        for parts in range(1, min(most, cdiv(blocks, slices)) + 1):
            length = cdiv(blocks, parts * slices)
            waves = cdiv(tiles * parts * slices, int(share * sms))
            cost = waves * (length + 8) * (1.0 + 0.02 * slices) + parts  # a block's start and end take some steps' time
            if best is None or cost < best[0]:
                best = cost, cdiv(blocks, length * slices), slices, length * _DEPTH
    assert best is not None
    return best[1:]


def forward(
    logits: torch.Tensor,
    table: torch.Tensor,
    maximum: torch.Tensor,
    logsum: torch.Tensor,
    temperature: float,
    spare: int,
    sms: int,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(soft [N, D] float32 of the first part, the others [parts - 1, N, D], parts), `spare` bytes at most for those."""
    (n, v), d = logits.shape, table.shape[1]
    parts, slices, length = plan(n, v, d, 1 + min(63, spare // (4 * n * d)), sms)
    soft = torch.empty((n, d), dtype=torch.float32, device=logits.device)
    others = soft if parts == 1 else torch.empty((parts - 1, n, d), dtype=torch.float32, device=logits.device)
    torch.ops.entrgi_cuda.hopper_forward_(
        logits, table, maximum, logsum, soft, others, parts, slices, length, temperature
    )
    return soft, others, parts
