"""Confidence of drawn tokens under the filtered softmax: one read of the logits after statistics and threshold."""

from __future__ import annotations

import torch
import triton.language as tl

from ..ranges import ranged
from . import config
from .launch import kernel, launch, rows_of, vector
from .sampling import _KEY_SHIFT, filter_thresholds, is_filtered, ordered_key
from .statistics import row_statistics


@kernel()
def _confidence_kernel(
    logits_ptr,
    stride_n,
    maximum_ptr,
    thresholds_ptr,
    tokens_ptr,
    out_ptr,
    v,
    inverse,
    ALG: tl.constexpr,
    FILTERED: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride_n
    m = tl.load(maximum_ptr + row)
    token = tl.minimum(tl.maximum(tl.load(tokens_ptr + row), 0), v - 1)
    own = tl.load(base + token).to(tl.float32)
    if ALG == "anchor":
        value = own
    else:
        threshold = tl.load(thresholds_ptr + row) if FILTERED else 0
        c = inverse * 1.4426950408889634
        lanes = tl.arange(0, BLOCK)
        mass = tl.zeros([BLOCK], tl.float32)
        moment = tl.zeros([BLOCK], tl.float32)
        first = tl.full([BLOCK], float("-inf"), tl.float32)
        second = tl.full([BLOCK], float("-inf"), tl.float32)
        for tile in range(0, v, BLOCK):
            index = tile + lanes
            x = tl.load(base + index, mask=index < v, other=float("-inf")).to(tl.float32)
            if FILTERED:
                x = tl.where(ordered_key(x, SHIFT) >= threshold, x, float("-inf"))
            e = tl.exp2((x - m) * c)
            mass += e
            if ALG == "entropy":
                moment += tl.where(e > 0, e * (x - m), 0.0)
            if ALG == "topk_margin":
                second = tl.maximum(second, tl.minimum(first, x))
                first = tl.maximum(first, x)
        total = tl.sum(mass, axis=0)
        if ALG == "entropy":
            entropy = tl.log(total) - tl.sum(moment, axis=0) * inverse / total
            value = -tl.where(entropy < 0, 0.0, entropy)
        elif ALG == "maskgit_plus":
            if FILTERED:
                own = tl.where(ordered_key(own, SHIFT) >= threshold, own, float("-inf"))
            value = tl.exp2((own - m) * c) / total
        else:
            # The lane that holds the maximum gives its second, every other lane its first. m is exact: it is a logit.
            lane = tl.min(tl.where(first == tl.max(first, axis=0), lanes, BLOCK), axis=0)
            others = tl.max(tl.where(lanes == lane, second, first), axis=0)
            value = (1.0 - tl.exp2((others - m) * c)) / total
    tl.store(out_ptr + row, tl.where(m != m, m, value))


@ranged
def unmask_confidence(
    logits: torch.Tensor, tokens: torch.Tensor, alg: str, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Confidence [N] float32; see :func:`entrgi_kernels.backends.eager.unmask_confidence`."""
    logits = rows_of(logits)
    n, v = logits.shape
    statistics = row_statistics(logits, temperature)
    filtered = alg != "anchor" and is_filtered(v, top_k, top_p)
    if alg == "entropy" and not filtered:
        return -statistics.entropy
    thresholds = statistics.maximum
    if filtered:
        thresholds = filter_thresholds(logits, statistics, temperature, top_k, top_p)
    entry = config.target(logits.device).architecture.confidence
    out = torch.empty(n, dtype=torch.float32, device=logits.device)
    launch(
        _confidence_kernel,
        (n,),
        logits,
        logits.stride(0),
        statistics.maximum,
        thresholds,
        vector(tokens),
        out,
        v,
        1.0 / temperature,
        num_warps=entry.num_warps,
        ALG=alg,
        FILTERED=filtered,
        SHIFT=_KEY_SHIFT[logits.dtype],
        BLOCK=entry.block,
    )
    return out
