"""The one place where kernels are launched, and what tensors must look like before they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The number of rows changes from step to step: kernels name it, and what follows from it, in `do_not_specialize`, so
# that a new N never compiles anew (Triton would tell 1 and multiples of 16 apart). Strides and V stay specialised: the
# width of loads hangs on them.
#
# The ahead-of-time gate puts a function here that records a launch instead of making it: what is compiled for other
# machines is then exactly what the raw functions would launch, argument for argument.
recorder: Callable[..., None] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 2, **meta: Any) -> None:
    """Launch `kernel` over `grid` (nothing when the grid is empty) on the device of the first tensor argument."""
    if min(grid) == 0:
        return
    if recorder is not None:
        recorder(kernel, grid, args, num_warps, num_stages, meta)
        return
    device = args[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **meta)
    else:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **meta)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [N, X] itself when its rows are dense (any row stride), else a dense copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def vector(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [N] with stride 1."""
    return tensor.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row starts on a multiple of 16 entries and 16 bytes: what Triton asks for wide, pipelined loads."""
    return all(tensor.stride(0) % 16 == 0 and tensor.data_ptr() % 16 == 0 for tensor in tensors)
