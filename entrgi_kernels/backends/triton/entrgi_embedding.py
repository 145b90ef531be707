"""The whole forward of a guidance step: one pass of statistics, a draw, and one product whose last pass blends."""

from __future__ import annotations

import torch

from .. import eager
from ..arguments import Draw, Placement
from ..ranges import ranged
from .launch import rows_of
from .sample_tokens import drawn
from .soft_embedding import forward
from .statistics import row_statistics


@ranged
def entrgi_embedding(
    logits: torch.Tensor,
    table: torch.Tensor,
    draw: Draw,
    tokens: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_mode: str,
    placement: Placement | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole forward: one pass of statistics, a draw, one product; see the eager backend for the outputs."""
    if table.dtype == torch.float64:
        return eager.entrgi_embedding(logits, table, draw, tokens, weight, weight_mode, placement)
    logits = rows_of(logits)
    found = row_statistics(logits, 1.0, second=draw.temperature, argmax=True)
    if weight_mode == "entropy":
        weight = found.share
    elif weight_mode == "given":
        assert weight is not None
        weight = weight.to(torch.float32, copy=True)
    else:
        weight = torch.full_like(found.entropy, 1.0 if weight_mode == "one" else 0.0)
    if tokens is not None:
        tokens = tokens.clone()
    elif weight_mode == "zero":
        tokens = torch.full_like(draw.keys, -1)
    else:
        tokens = drawn(logits, found.maximum, found.logsum2, draw)
    if placement is None:
        index, out = (
            None,
            torch.empty((logits.shape[0], table.shape[1]), dtype=table.dtype, device=logits.device),
        )
    else:
        out, index = placement
    soft = forward(logits, table, found.maximum, found.logsum2, draw.temperature, (tokens, weight, out), index)
    return out, tokens, weight, found.entropy, soft, found.lse2, found.argmax
