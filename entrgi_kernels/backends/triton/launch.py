"""The one place where kernels are launched, and what tensors must look like before they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x (x >= 1)."""
    return 1 << (x - 1).bit_length()
