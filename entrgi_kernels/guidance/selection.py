"""Which masked positions a denoising step commits. Tensors over trajectories and response slots, no host waits."""

from __future__ import annotations

import torch

from ..backends import philox


def ranked_slots(confidence: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Slots [R, L] of each trajectory in the order in which they would be committed; unmasked ones last.

    Args:
        confidence: [R, L]; -inf (a postponed token) and NaN come last among the masked positions, ties by position.
        masked: [R, L] bool.
    """
    lowest = torch.finfo(confidence.dtype).min
    score = confidence.nan_to_num(nan=lowest, posinf=torch.finfo(confidence.dtype).max, neginf=lowest)
    return score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def best_positions(confidence: torch.Tensor, masked: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts` most confident masked positions of each trajectory.

    Args:
        confidence, masked: as in :func:`ranked_slots`; no unmasked position is ever chosen.
        counts: [R] int64.

    Returns:
        [R, L] bool, the chosen positions.
    """
    order = ranked_slots(confidence, masked)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return masked & (rank < counts[:, None])


def perturbed(confidence: torch.Tensor, alg_temp: float, rng: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Confidence whose best positions are a draw without replacement from softmax(confidence / alg_temp).

    Gumbel noise makes it that draw. Postponed tokens (-inf) stay last.

    Args:
        confidence: [R, L].
        alg_temp: > 0.
        rng: int64 [2] (seed, step).
        keys: int64 [R, L] row keys.
    """
    noise = philox.exponential(rng, keys, torch.zeros_like(keys), confidence.dtype).log()
    return confidence / alg_temp - noise


def independent_positions(masked: torch.Tensor, share: float, rng: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Each masked position with probability `share` (alg "origin").

    Args:
        masked: [R, L] bool.
        share: probability, 1 at the last step.
        rng: int64 [2] (seed, step).
        keys: int64 [R, L] row keys.
    """
    return masked & (philox.uniform(rng, keys, torch.zeros_like(keys)) < share)
