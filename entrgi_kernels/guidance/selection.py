"""Which masked positions a denoising step commits. Tensors over trajectories and response slots, no host waits."""

from __future__ import annotations

import torch

from ..backends import philox


def best_positions(confidence: torch.Tensor, masked: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts` most confident masked positions of each trajectory.

    Args:
        confidence: [R, L]; -inf (a postponed token) and NaN come last among the masked positions, ties by position.
        masked: [R, L] bool; no other position is ever chosen.
        counts: [R] int64.

    Returns:
        [R, L] bool, the chosen positions.
    """
    lowest = torch.finfo(confidence.dtype).min
    score = confidence.nan_to_num(nan=lowest, posinf=torch.finfo(confidence.dtype).max, neginf=lowest)
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return masked & (rank < counts[:, None])


def drawn_positions(
    confidence: torch.Tensor,
    masked: torch.Tensor,
    counts: torch.Tensor,
    alg_temp: float,
    rng: torch.Tensor,
    keys: torch.Tensor,
) -> torch.Tensor:
    """`counts` positions drawn without replacement from softmax(confidence / alg_temp) over the masked ones.

    Adding Gumbel noise and taking the best is that draw. Postponed tokens (-inf) are taken when nothing else is left.

    Args:
        confidence, masked, counts: as in :func:`best_positions`.
        alg_temp: > 0.
        rng: int64 [2] (seed, step).
        keys: int64 [R, L] row keys.
    """
    noise = philox.exponential(rng, keys, torch.zeros_like(keys), confidence.dtype).log()
    return best_positions(confidence / alg_temp - noise, masked, counts)


def independent_positions(masked: torch.Tensor, share: float, rng: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Each masked position with probability `share` (alg "origin").

    Args:
        masked: [R, L] bool.
        share: probability, 1 at the last step.
        rng: int64 [2] (seed, step).
        keys: int64 [R, L] row keys.
    """
    return masked & (philox.uniform(rng, keys, torch.zeros_like(keys)) < share)
