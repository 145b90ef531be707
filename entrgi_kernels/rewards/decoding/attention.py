"""Attention with gradients on a CPU, as two batched products.

torch's flash attention for CPUs is made for long sequences: its backward takes milliseconds for the few positions of a
guided response, most of a small reward model's time. Here scores exist as a matrix, in float32 at least, and
query heads that share keys are rows of one product, so that no keys are repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

NAME = "entrgi_products"  # as transformers' registry of attention functions knows it
IN_PLACE_OF = "sdpa"

# Scores B * H * Q * K up to which the products are used. Measured on two AVX-512 cores, forward and backward together:
# ahead of torch's kernel by 5 times at 6 thousand scores and 1.7 times at 3 million in bfloat16 (float32: 1.5 and
# 1.4), level with it at 10 million, behind at 16.
MOST_SCORES = 2**22


class Products(torch.autograd.Function):
    """softmax(scale q k^T + mask) v with the probabilities kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        rows, heads, count, width = query.shape
        shared, total = key.shape[1:3]
        wide = torch.promote_types(query.dtype, torch.float32)
        # Query head h uses keys h // (heads / shared): the heads of a group are rows one after another.
        q = query.reshape(rows * shared, heads // shared * count, width).to(wide)
        k, v = (tensor.reshape(rows * shared, total, -1).to(wide) for tensor in (key, value))
        p = torch.bmm(q, k.mT).mul_(scale)
        if mask is not None:
            p.view(rows, shared, -1, count, total).masked_fill_(~mask[:, :, None], -torch.inf)
        p = torch.softmax(p, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.shapes, ctx.dtype = scale, (query.shape, key.shape, value.shape), query.dtype
        return torch.bmm(p, v).view(rows, heads, count, -1).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        grad = grad.reshape(*p.shape[:2], -1).to(p.dtype)
        found: list[torch.Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[2]:
            found[2] = torch.bmm(p.mT, grad)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            change = torch.bmm(grad, v.mT)
            change = change.sub_((change * p).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
            found[0] = torch.bmm(change, k)
            found[1] = torch.bmm(change.mT, q)
        back = (
            None if tensor is None else tensor.view(shape).to(ctx.dtype)
            for tensor, shape in zip(found, ctx.shapes, strict=True)
        )
        return *back, None, None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: query [B, H, Q, d], keys and values [B, H', K, d] to [B, Q, H, d].

    What the products do not cover, or are not faster for, goes to the function in whose place this one is.
    """
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    covered = (
        isinstance(attention_mask, torch.Tensor)
        and attention_mask.dtype == torch.bool
        and attention_mask.dim() == 4
        and attention_mask.shape[1] == 1
        and attention_mask.shape[3] == key.shape[2]
        and not dropout
        and not set(kwargs) & {"softcap", "position_bias", "cache"}
        and query.shape[1] % key.shape[1] == 0
        and query.device.type == "cpu"
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and scores <= MOST_SCORES
    )
    if not covered:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS[IN_PLACE_OF](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return Products.apply(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def products_in(config: Any) -> Iterator[None]:
    """Let a network of transformers whose attention is "sdpa" use the products inside, where they are faster.

    Args:
        config: its configuration, changed for as long as the block runs.
    """
    if config._attn_implementation != IN_PLACE_OF:
        yield
        return
    _register()
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = IN_PLACE_OF
