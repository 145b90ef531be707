"""The other engine of both products: a chunk of the vocabulary at a time in memory, cuBLAS for the product.

Forward: probabilities of a chunk in the table's dtype, then torch.addmm into float32. Backward: torch.mm of the
gradient with a chunk of the table into float32, then one elementwise kernel that forms the softmax gradient and takes
the Adam step. Chunks are sized by a byte budget (:meth:`.config.Architecture.spare_bytes`), so that the memory beyond
the logits and Adam's state stays under a share of the logits' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import config
from .launch import Matrix, Vector, cdiv, kernel, launch


@kernel()
def _probability_kernel(
    logits_ptr: Matrix,
    stride_n,
    maximum_ptr: Vector,
    logsum_ptr: Vector,
    out_ptr: Matrix,
    first,
    length,
    inverse,
    log2_scale,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = index < length
    x = tl.load(logits_ptr + row * stride_n + first + index, mask=mask, other=float("-inf")).to(tl.float32)  # [BV]
    offset = log2_scale - tl.load(logsum_ptr + row) * 1.4426950408889634
    p = tl.exp2((x - tl.load(maximum_ptr + row)) * (inverse * 1.4426950408889634) + offset)
    tl.store(out_ptr + row * length + index, p.to(out_ptr.dtype.element_ty), mask=mask)


class Step(NamedTuple):
    """What is made of the product g . E_v: "adam", the softmax gradient's step, "gradient", that itself, or "linear".

    A step of Adam is given lr / correction1, 1 / sqrt(correction2) and the rest, and what it does with the moments: a
    first one reads none, for they are zero; a last one writes none. The linear one is logits += step_size (g . E_v -
    delta).
    """

    step_size: float
    root_correction: float
    beta1: float
    beta2: float
    eps: float
    reads: bool
    writes: bool
    epilogue: str = "adam"

    @classmethod
    def linear(cls, scale: float) -> Step:
        """The first-order update's."""
        return cls(scale, 0.0, 0.0, 0.0, 0.0, reads=False, writes=False, epilogue="linear")

    @property
    def scalars(self) -> tuple[float, ...]:
        """The kernels' arguments."""
        return self[:5]

    @property
    def flags(self) -> dict[str, Any]:
        """The kernels' constants."""
        return {"EPILOGUE": self.epilogue, "READS": self.reads, "WRITES": self.writes}


# Where the gradient itself is wanted.
NO_STEP = Step(0.0, 0.0, 0.0, 0.0, 0.0, reads=False, writes=False, epilogue="gradient")


@triton.jit
def adam(x, p, product, delta, m, v, inverse, step_size, root_correction, beta1, beta2, eps):
    """(new logit, new first and second moment) from p, g . E_v = `product` and g . soft = `delta`; all float32."""
    g = p * (product - delta) * inverse
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    return x - step_size * m / (tl.sqrt(v) * root_correction + eps), m, v


@kernel()
def _update_kernel(
    logits_ptr: Matrix,
    stride_n,
    product_ptr: Matrix,
    delta_ptr: Vector,
    lse_ptr: Vector,
    exp_avg_ptr: Matrix,
    stride_m,
    exp_avg_sq_ptr: Matrix,
    stride_v,
    out_ptr: Matrix,
    stride_o,
    first,
    length,
    inverse,
    step_size,
    root_correction,
    beta1,
    beta2,
    eps,
    EPILOGUE: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = index < length
    x = tl.load(logits_ptr + row * stride_n + first + index, mask=mask, other=float("-inf")).to(tl.float32)  # [BV]
    product = tl.load(product_ptr + row * length + index, mask=mask, other=0.0).to(tl.float32)  # [BV]
    delta = tl.load(delta_ptr + row)
    out = out_ptr + row * stride_o + first + index
    if EPILOGUE == "linear":
        tl.store(out, (x + step_size * (product - delta)).to(out_ptr.dtype.element_ty), mask=mask)
        return
    p = tl.exp(x * inverse - tl.load(lse_ptr + row))
    if EPILOGUE == "adam":
        m = tl.zeros([BLOCK_V], tl.float32)  # [BV]
        s = tl.zeros([BLOCK_V], tl.float32)
        m_ptrs = exp_avg_ptr + row * stride_m + first + index
        s_ptrs = exp_avg_sq_ptr + row * stride_v + first + index
        if READS:
            m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(s_ptrs, mask=mask, other=0.0).to(tl.float32)
        x, m, s = adam(x, p, product, delta, m, s, inverse, step_size, root_correction, beta1, beta2, eps)
        if WRITES:
            tl.store(m_ptrs, m.to(exp_avg_ptr.dtype.element_ty), mask=mask)
            tl.store(s_ptrs, s.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
        tl.store(out, x.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out, (p * (product - delta) * inverse).to(out_ptr.dtype.element_ty), mask=mask)


def chunks(n: int, v: int, bytes_per_entry: int, budget: int) -> Iterator[tuple[int, int]]:
    """(first, length) over the vocabulary: multiples of 256 (but for the last) within `budget` bytes where it can."""
    length = max(256, budget // max(1, n * bytes_per_entry) // 256 * 256)
    length = cdiv(v, cdiv(v, length) * 256) * 256  # even shares: no sliver at the end
    return ((first, min(length, v - first)) for first in range(0, v, length))


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """out (float32) = a @ b, plus out when `add`; float32 sums of 16-bit operands."""
    kind: Any = {"out_dtype": torch.float32}
    if a.dtype == torch.float32 or a.device.type != "cuda":
        a, b, kind = a.float(), b.float(), {}
    # With out= a caller's autocast leaves them alone: of a @ b it would make a product in bfloat16.
    if add:
        torch.addmm(out, a, b, out=out, **kind)
    else:
        torch.mm(a, b, out=out, **kind)


def forward(
    logits: torch.Tensor,
    table: torch.Tensor,
    maximum: torch.Tensor,
    logsum: torch.Tensor,
    temperature: float,
    log2_scale: float,
) -> torch.Tensor:
    """soft [N, D] float32. `logits` and `table` with dense rows; see :mod:`.soft_embedding` for the scale."""
    (n, v), d = logits.shape, table.shape[1]
    architecture = config.target(logits.device).architecture
    block = architecture.elementwise
    width = table.element_size()
    parts = list(chunks(n, v, width, architecture.spare_bytes(logits, d, width)))
    scratch = torch.empty(n * parts[0][1], dtype=table.dtype, device=logits.device)
    soft = torch.empty((n, d), dtype=torch.float32, device=logits.device)
    for first, length in parts:
        p = scratch[: n * length].view(n, length)
        launch(
            _probability_kernel,
            (n, cdiv(length, block.block)),
            logits,
            logits.stride(0),
            maximum,
            logsum,
            p,
            first,
            length,
            1.0 / temperature,
            log2_scale,
            num_warps=block.num_warps,
            BLOCK_V=block.block,
        )
        multiply(p, table[first : first + length], soft, add=first > 0)
    return soft.mul_(2.0**-log2_scale) if log2_scale else soft


def backward(
    logits: torch.Tensor,
    grad: torch.Tensor,
    table: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    out: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor] | None,
    step: Step,
) -> None:
    """Softmax gradient into `out` [N, V]; or a step of Adam on `out` (the logits) and `moments`, or the linear one.

    Args:
        grad: [N, D] of the product's dtype. delta: [N] float32, what is taken from each row's product.
    """
    (n, v), d = logits.shape, table.shape[1]
    architecture = config.target(logits.device).architecture
    block = architecture.elementwise
    parts = list(chunks(n, v, 4, architecture.spare_bytes(logits, d, table.element_size())))
    scratch = torch.empty(n * parts[0][1], dtype=torch.float32, device=logits.device)
    exp_avg, exp_avg_sq = moments or (out, out)
    for first, length in parts:
        product = scratch[: n * length].view(n, length)
        multiply(grad, table[first : first + length].to(grad.dtype).t(), product, add=False)
        launch(
            _update_kernel,
            (n, cdiv(length, block.block)),
            logits,
            logits.stride(0),
            product,
            delta,
            lse,
            exp_avg,
            exp_avg.stride(0),
            exp_avg_sq,
            exp_avg_sq.stride(0),
            out,
            out.stride(0),
            first,
            length,
            1.0 / temperature,
            *step.scalars,
            num_warps=block.num_warps,
            **step.flags,
            BLOCK_V=block.block,
        )
