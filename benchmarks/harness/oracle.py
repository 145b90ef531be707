"""The correctness gate: what a benchmark checks, in the same run, before it may report a speed.

The truth is float64, computed here in plain torch on a few rows (rows do not influence each other) and a block of the
vocabulary at a time. The bound is the error that plain torch makes in the same dtype, times a small factor: a fused
kernel is not asked to be better than the arithmetic it replaces, and is not allowed to be worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.harness.inputs import StepSettings


@dataclass(frozen=True)
class Check:
    """Outcome of a gate: `passed`, and in words what was compared."""

    passed: bool
    detail: str


@dataclass
class Truth:
    """float64 values of one step for chosen rows.

    embedding [n, D], entropy [n] nats, weight [n], soft [n, D], grad [n, V] (of the loss for phi), phi [n, V] after
    `steps` Adam steps with that same gradient each time.
    """

    embedding: torch.Tensor
    entropy: torch.Tensor
    weight: torch.Tensor
    soft: torch.Tensor
    grad: torch.Tensor
    phi: torch.Tensor


def chosen_rows(n: int, most: int = 12) -> torch.Tensor:
    """Row numbers that a check looks at: the ends and evenly between."""
    return torch.linspace(0, n - 1, min(n, most)).round().long().unique()


def soft_products(
    phi: torch.Tensor, table: torch.Tensor, temperature: float, grad: torch.Tensor | None = None, block: int = 16384
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """float64 softmax(phi / temperature) [n, V], its product with the table [n, D], and grad @ table^T [n, V]."""
    probability = (phi.double() / temperature).softmax(dim=-1)
    soft = torch.zeros(phi.shape[0], table.shape[1], dtype=torch.float64, device=phi.device)
    back = None if grad is None else torch.empty_like(probability)
    for start in range(0, table.shape[0], block):
        part = table[start : start + block].double()
        soft += probability[:, start : start + block] @ part
        if back is not None and grad is not None:
            back[:, start : start + block] = grad.double() @ part.t()
    return probability, soft, back


def truth(
    phi: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor, grad: torch.Tensor, settings: StepSettings
) -> Truth:
    """One guidance step in float64.

    Args:
        phi: [n, V] logits before the step. table: [V, D]. tokens: [n] hard tokens.
        grad: [n, D], the gradient of the loss for the embedding.
    """
    log_q = phi.double().log_softmax(dim=-1)
    entropy = torch.special.entr(log_q.exp()).sum(dim=-1)
    weight = {
        "entropy": entropy / math.log(max(phi.shape[-1], 2)),
        "one": torch.ones_like(entropy),
        "zero": torch.zeros_like(entropy),
    }[settings.weight]
    p, soft, back = soft_products(phi, table, settings.temperature, grad)
    assert back is not None
    hard = table[tokens.clamp_min(0)].double()
    dphi = p * (back - (grad.double() * soft).sum(dim=-1, keepdim=True)) / settings.temperature
    moved = phi.double() - settings.lr * dphi / (dphi.abs() + settings.eps)
    mixed = soft + weight.unsqueeze(-1) * (hard - soft)
    return Truth(mixed, entropy, weight, soft, dphi, moved)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error over the largest absolute exact value; inf when `value` holds a NaN or an infinity."""
    if not torch.isfinite(value).all():
        return math.inf
    scale = exact.abs().max().clamp_min(1e-30)
    return float((value.double() - exact).abs().max() / scale)


def flip_rate(update: torch.Tensor, exact: torch.Tensor, lr: float) -> float:
    """Share of entries whose Adam update has the wrong sign, among those whose exact one is at least a tenth of lr."""
    told = exact.abs() >= 0.1 * lr
    wrong = (update.double() * exact <= 0) & told
    return float(wrong.sum() / told.sum().clamp_min(1))


def compare(name: str, error: float, bound: float) -> Check:
    """A check that `error` is at most `bound`; a NaN fails."""
    return Check(error <= bound, f"{name} {error:.2e} (bound {bound:.1e})")


def combine(checks: list[Check]) -> Check:
    """All of them; the detail names those that failed, or all when none did."""
    failed = [check for check in checks if not check.passed]
    return Check(not failed, "; ".join(check.detail for check in failed or checks))


def in_nucleus(
    phi: torch.Tensor, tokens: torch.Tensor, temperature: float, top_p: float, top_k: int | None, slack: float = 2e-3
) -> Check:
    """Whether every drawn token lies in the allowed set: mass of strictly larger logits <= top_p (+ rounding slack)."""
    if bool(((tokens < 0) | (tokens >= phi.shape[-1])).any()):
        return Check(False, "a drawn token is outside the vocabulary")
    worst = 0.0
    beaten = 0
    for row, token in zip(phi.double(), tokens.tolist(), strict=True):
        better = row > row[token]
        mass = (row / temperature).softmax(dim=-1)[better].sum()
        worst = max(worst, float(mass))
        beaten = max(beaten, int(better.sum()))
    checks = [compare("mass above a drawn token", worst, top_p + slack)]
    if top_k is not None:
        checks.append(Check(beaten < top_k, f"a drawn token has {beaten} better ones (top_k {top_k})"))
    return combine(checks)
