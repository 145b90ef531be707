"""The one place where kernels are launched, and what tensors must look like before they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

# Pointers to vectors over rows (and to the random state), as all kernels name them. Many are views into a buffer, at a
# place that depends on N: whether that is a multiple of 16 bytes must not decide what is compiled, and since a program
# reads few of their entries nothing is lost by not knowing.
_VECTORS = (
    "maximum_ptr",
    "logsum_ptr",
    "lse_ptr",
    "lse2_ptr",
    "logsum2_ptr",
    "share_ptr",
    "entropy_ptr",
    "grad_lse_ptr",
    "grad_entropy_ptr",
    "delta_ptr",
    "weight_ptr",
    "tokens_ptr",
    "thresholds_ptr",
    "rows_ptr",
    "index_ptr",
    "rng_ptr",
)

# The ahead-of-time gate puts a function here that records a launch instead of making it: what is compiled for other
# machines is then exactly what the raw functions would launch, argument for argument.
recorder: Callable[..., None] | None = None


def kernel(*counts: str) -> Callable[[Callable[..., None]], Any]:
    """triton.jit for a kernel whose arguments `counts` follow from the number of rows.

    That number changes from step to step, so Triton is told to specialise for none of them (it would tell 1 and
    multiples of 16 apart): a new N compiles nothing. Strides and V stay specialised: the width of loads hangs on them.
    """
    return triton.jit(do_not_specialize=counts, do_not_specialize_on_alignment=_VECTORS)


def launch(function: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 2, **meta: Any) -> None:
    """Launch `function` over `grid` (nothing when the grid is empty) on the device of the first tensor argument."""
    if min(grid) == 0:
        return
    # Fused multiply-adds, said aloud: what Triton does unasked changes between its releases.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if recorder is not None:
        recorder(function, args, options | meta)
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            function[grid](*args, **options, **meta)
    else:
        function[grid](*args, **options, **meta)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [N, X] itself when its rows are dense (any row stride), else a dense copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def vector(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [N] with stride 1."""
    return tensor.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def bulk(*tensors: torch.Tensor) -> bool:
    """Whether tiles of every [N, X] tensor can be copied in bulk: base and rows on 16 bytes, rows apart."""
    return all(
        tensor.numel() > 0
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def tiles(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor by which a kernel reads [rows, columns] of a tensor that :func:`bulk` lets pass; zeros outside it.

    It is made on the host at every launch and goes to the kernel by value, so that a captured graph holds it. Its
    sizes are ordinary arguments of what is compiled.
    """
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], [rows, columns])


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row starts on a multiple of 16 entries and 16 bytes: what Triton asks for wide, pipelined loads."""
    return all(tensor.stride(0) % 16 == 0 and tensor.data_ptr() % 16 == 0 for tensor in tensors)
