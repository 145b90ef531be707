"""Token log-probabilities under a vocabulary head, from raw functions that every fast backend has anyway.

The vocabulary is walked in chunks that fit a byte budget: the logits of a chunk by torch's own product (oneDNN,
cuBLAS), then one of the backend's fused passes over them: row statistics where only values are wanted, the soft
embedding (which is softmax @ head) where the gradient of hidden is, the table's gradient where the head learns. Chunks
are put together by their log-sum-exps.

The target is left out of those passes and joined last. So its gradient, by 1 - p, is a sum over the other tokens: of a
near-certain token, where 1 - p is far below the rounding of 16-bit sums with p in them, it keeps its digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..backends.eager import accumulation_dtype, legal_targets, places

# Bytes of a chunk's logits. Large enough that merging chunks ([N, D] each) costs little beside their products.
CHUNK_BYTES = 32 << 20


def _chunks(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(slice of the vocabulary, head's rows, logits [N, v]) in the wider of the two dtypes."""
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    x, v = hidden.to(dtype), head.shape[0]
    parts = max(1, math.ceil(hidden.shape[0] * v * dtype.itemsize / CHUNK_BYTES))
    length = max(256, math.ceil(v / parts / 256) * 256)
    wide = x.device.type == "cuda" and dtype.itemsize == 2
    # oneDNN's bfloat16 product on AMX reads past a row that does not fill its tiles, and multiplies what it finds by 0:
    # a NaN there, of a bad row or of nobody, would be this row's too.
    short = -x.shape[1] % 32 if x.device.type == "cpu" and dtype == torch.bfloat16 else 0
    if short:
        x = torch.nn.functional.pad(x, (0, short))
    with torch.autocast(x.device.type, enabled=False):
        for first in range(0, v, length):
            part = slice(first, min(first + length, v))
            rows = head[part].to(dtype)
            columns = torch.nn.functional.pad(rows, (0, short)).T if short else rows.T
            # 16-bit operands: float32 logits where the library can give them, else rounded, as a model's own are.
            logits = torch.mm(x, columns, out_dtype=torch.float32) if wide else torch.mm(x, columns)
            yield part, rows, logits if bias is None else logits.add_(bias[part].to(logits.dtype))


def _without_targets(logits: torch.Tensor, inside: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """The target's logit a row [N], NaN where it is outside the chunk; in `logits` -inf takes its place."""
    found = logits.gather(-1, column[:, None])[:, 0]
    logits.scatter_(1, column[:, None], found.masked_fill(inside, -math.inf)[:, None])
    return found.masked_fill(~inside, math.nan)


def _without_mass(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """bool [N], rows with nothing but -inf in this chunk; None where no row can be one."""
    if bias is None and logits.shape[1] > 1:  # at most one -inf, the target
        return None
    return (logits == -math.inf).all(dim=-1)


def token_log_prob(
    softmax_entropy: Callable[..., Any],
    soft_embedding: Callable[..., Any],
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    slope: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`entrgi_kernels.backends.eager.token_log_prob`, on two passes of a backend."""
    acc = accumulation_dtype(hidden, head)
    n, d = hidden.shape
    others = torch.full((n,), -math.inf, dtype=acc, device=hidden.device)  # log-sum-exp without the target
    picked = torch.full_like(others, math.nan)
    mean = others.new_zeros(n if slope else 0, d)
    for part, rows, logits in _chunks(hidden, head, bias):
        inside, column = places(targets, part)
        picked = torch.where(inside, _without_targets(logits, inside, column).to(acc), picked)
        if slope:
            soft, found = soft_embedding(logits, rows, 1.0)
        else:
            soft, found = None, softmax_entropy(logits, 1.0)[0]
        empty = _without_mass(logits, bias)
        if empty is not None:
            found = found.masked_fill(empty, -math.inf)
        total = torch.logaddexp(others, found)
        if soft is not None:
            shares = [(old - total).exp().masked_fill(old == -math.inf, 0)[:, None] for old in (others, found)]
            if empty is not None:
                soft = soft.masked_fill(empty[:, None], 0)
            mean = mean.mul_(shares[0]).add_(soft * shares[1])
        others = total
    lse = torch.logaddexp(others, picked)
    if slope:
        legal, ignored = legal_targets(targets, head.shape[0])
        mean = (others - lse).exp()[:, None] * (head[legal].to(acc) - mean)
        mean = torch.where(lse.isfinite()[:, None], mean, math.nan).masked_fill_(ignored[:, None], 0)
    return picked - lse, lse, mean


def token_log_prob_backward(
    soft_embedding: Callable[..., Any],
    soft_embedding_grad_table: Callable[..., Any],
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`entrgi_kernels.backends.eager.token_log_prob_backward`, on two passes of a backend."""
    acc, v = lse.dtype, head.shape[0]
    g = grad.to(acc)[:, None]
    dtype = torch.promote_types(hidden.dtype, head.dtype)
    # What the table's gradient is contracted with: a column of ones beside hidden makes the bias's gradient with it.
    weighted = g * hidden.to(acc)
    if bias is not None:
        weighted = torch.cat([weighted, g], dim=1)
    pull = (-weighted).to(dtype)  # the sign here, where it is N rows: the table's gradient is not read again for it
    mean = torch.zeros(hidden.shape, dtype=acc, device=hidden.device)
    rest = torch.zeros_like(lse)  # 1 - p of the target
    change = None
    for part, rows, logits in _chunks(hidden, head, bias):
        _without_targets(logits, *places(targets, part))
        soft, found = soft_embedding(logits, rows, 1.0)
        empty = _without_mass(logits, bias)
        share = (found - lse).exp()
        if empty is not None:
            share, soft = share.masked_fill(empty, 0), soft.masked_fill(empty[:, None], 0)
        mean.add_(soft * share[:, None])
        rest += share
        pulled = soft_embedding_grad_table(logits, pull, lse, 1.0, dtype)
        if part.stop - part.start == v:  # nothing to put together
            change = pulled
        else:
            change = pulled.new_empty(v, pulled.shape[1]) if change is None else change
            change[part] = pulled
    assert change is not None
    legal = legal_targets(targets, v)[0]
    grad_hidden = g * (rest[:, None] * head[legal].to(acc) - mean)
    # Rows of one target are summed at the first of them, in the wide dtype; duplicates then write the same. Not by
    # index_add_, whose order of sums changes from run to run on GPUs.
    numbers = torch.arange(len(legal), device=legal.device)
    first = numbers.new_zeros(v).scatter_reduce_(0, legal, numbers, "amin", include_self=False)[legal]
    pushed = torch.zeros_like(weighted).index_put_((first,), rest[:, None] * weighted, accumulate=True)[first]
    change[legal] = (pushed + change[legal].to(acc)).to(dtype)
    grad_head, grad_bias = change.to(head.dtype), change.new_empty(0, dtype=head.dtype)
    if bias is not None:  # memory of their own: outputs of an operator may not be views of one tensor
        grad_bias = change[:, -1].to(bias.dtype, copy=True)
        grad_head = torch.empty(head.shape, dtype=head.dtype, device=head.device).copy_(change[:, :-1])
    return grad_hidden.to(hidden.dtype), grad_head, grad_bias
