"""What is right, in float64, and how far rounding may take a result from it.

The formulas are the eager backend's, written out in NumPy. Bounds are elementwise, and come from the arithmetic of the
dtype that a backend accumulates in: not from what another backend happens to give.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from entrgi_kernels.backends import philox

from .draws import Failure

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def acc_of(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


class Rows:
    """Facts in float64 about softmax(logits / temperature) of the good rows, with what the statistics may be off by.

    Attributes:
        good: bool [n], rows without NaN or +inf and with a finite entry; the rest is of them alone.
        x, shift, p, lse, entropy: logits [g, v], (x - max) / tau, softmax, log-sum-exp [g], entropy [g].
        rounding: relative error of sums of v terms in acc.
        relative: [g, v], relative error of p in a forward.
        drift: [g, 1], relative error of p recomputed from a log-sum-exp rounded to acc.
        overflows: bool [g], x / tau does not fit acc.
    """

    def __init__(self, logits: torch.Tensor, temperature: float, acc: torch.dtype) -> None:
        x = array(logits)
        self.tau = tau = float(temperature) or 1.0
        with np.errstate(all="ignore"):
            top = x.max(axis=1) if len(x) else np.zeros(0)
            self.good = np.isfinite(top)
            self.x = x = x[self.good]
            top = top[self.good][:, None]
            self.shift = (x - top) / tau
            weights = np.exp(self.shift)
            total = weights.sum(axis=1, keepdims=True)
            self.p = weights / total
            self.lse = (top / tau + np.log(total))[:, 0]
            logs = np.where(self.p > 0, self.shift, 0)
            self.entropy = np.maximum(np.log(total[:, 0]) - (self.p * logs).sum(axis=1), 0)
            self.eps = EPS[acc]
            v = x.shape[1]
            # v / 4: beside a large term equal small ones lose the same bits each time.
            self.rounding = self.eps * (16 + 4 * math.sqrt(v) + v / 4)
            self.relative = self.rounding + self.eps * 4 * (1 + np.minimum(np.abs(self.shift), 1000))
            # Shifts of very unlikely entries carry no weight: the reach is that of entries that have some.
            reach = np.abs(top[:, 0] / tau)
            self.size = reach + np.abs(self.lse)
            likely = np.where(self.p > 1e-30, np.abs(x / tau), 0).max(axis=1) if v else reach
            self.drift = np.expm1(np.minimum(8 * self.eps * (likely + self.size + 4), 700))[:, None]
            largest = torch.finfo(acc).max / 16
            self.overflows = (np.abs(np.where(np.isfinite(x), x / tau, 0)).max(axis=1) > largest) | (
                self.size > largest
            )
            spread = 2 + math.log(v)
            self.lse_bound = 8 * self.eps * self.size + self.rounding * spread
            self.entropy_bound = self.rounding * spread**2


def near(name: str, ours: torch.Tensor | np.ndarray, truth: np.ndarray, bound: np.ndarray | float, dtype: torch.dtype,
         rows: np.ndarray | None = None) -> None:  # fmt: skip
    """Raise Failure unless |ours - truth| <= bound, plus a rounding to dtype; numbers beyond its largest count as that.

    Args:
        rows: where they are a part, the good rows: only those of `ours` are looked at.
    """
    ours = array(ours) if isinstance(ours, torch.Tensor) else ours
    if rows is not None:
        ours = ours[rows]
    if ours.shape != truth.shape:
        raise Failure(f"{name} has shape {list(ours.shape)}, expected {list(truth.shape)}")
    if not truth.size:
        return
    info = torch.finfo(dtype)
    with np.errstate(all="ignore"):
        allowed = bound + 2 * EPS[dtype] * np.abs(truth) + (info.smallest_normal if info.bits > 16 else 2.0**-24)
        wrong = ~(np.abs(np.clip(ours, info.min, info.max) - np.clip(truth, info.min, info.max)) <= allowed)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        allowed = np.broadcast_to(allowed, truth.shape)
        raise Failure(
            f"{name} is wrong: {ours[at]:.9g} where {truth[at]:.9g} is right (bound {allowed[at]:.2g}) at {list(at)}, "
            f"{int(wrong.sum())} of {wrong.size}"
        )


def all_nan(name: str, tensor: torch.Tensor, bad: np.ndarray) -> None:
    if bad.any() and not np.isnan(array(tensor)[bad]).all():
        raise Failure(f"{name} of a bad row is not NaN")


class Race:
    """The draw in float64: scores of the exponential race, and what filters keep, with their ties within rounding."""

    def __init__(self, facts: Rows, keys: torch.Tensor, rng: torch.Tensor, top_k: int | None, top_p: float | None):
        self.facts = facts
        g, v = facts.x.shape
        rows = keys[torch.from_numpy(facts.good)][:, None]
        noise = np.log(philox.exponential(rng, rows, torch.arange(v)[None, :], torch.float64).numpy())
        self.score = np.where(facts.p >= 0, facts.shift, -np.inf) - noise
        # Twice: scores are differences of the two, each rounded.
        self.slack = 16 * facts.eps * (2 + np.minimum(np.abs(facts.shift), 1e300) + np.abs(noise))
        self.sure, self.maybe = kept(facts, top_k, top_p)

    def check(self, tokens: torch.Tensor) -> None:
        """Raise Failure unless each row's token is the race's winner, or ties with it within rounding."""
        facts, ours = self.facts, tokens.numpy()
        if (ours[~facts.good] != -1).any():
            raise Failure("the token of a bad row is not -1")
        ours = ours[facts.good]
        g, v = facts.x.shape
        if ((ours < 0) | (ours >= v)).any():
            raise Failure(f"token {int(ours[(ours < 0) | (ours >= v)][0])} of {v}")
        at = np.arange(g), ours
        if not self.maybe[at].all():
            raise Failure(f"a filtered token was drawn, in good row {int(np.argmin(self.maybe[at]))}")
        own_x, own = facts.x[at][:, None], self.score[at]
        # Kept sets are upper ends of the row: with the token, all at or above it are kept.
        rivals = (self.sure | (facts.x >= own_x)) & (facts.x > -np.inf)
        best = np.where(rivals, self.score - self.slack, -np.inf).max(axis=1) if g else own
        lost = own + self.slack[at] < best
        if lost.any():
            row = int(np.argmax(lost))
            raise Failure(
                f"token {int(ours[row])} of good row {row} lost the race by {best[row] - own[row]:.3g} beyond rounding"
            )


def kept(facts: Rows, top_k: int | None, top_p: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(bool [g, v] surely kept, bool [g, v] kept perhaps): apart only where the mass above ties with top_p."""
    x = facts.x
    sure, maybe = x > -np.inf, x > -np.inf
    if not x.size:
        return sure, maybe
    order = np.argsort(-x, axis=1, kind="stable")
    ranked = np.take_along_axis(x, order, axis=1)
    # The place of the first of several ties: how many entries are strictly larger.
    new = np.concatenate([np.ones((len(x), 1), bool), ranked[:, 1:] != ranked[:, :-1]], axis=1)
    first = np.maximum.accumulate(np.where(new, np.arange(x.shape[1]), 0), axis=1)
    above = np.empty_like(first)
    if top_p is not None and top_p < 1:
        mass = np.cumsum(np.take_along_axis(facts.p, order, axis=1), axis=1)
        mass = np.take_along_axis(np.concatenate([np.zeros((len(x), 1)), mass], axis=1), first, axis=1)
        exact = np.empty_like(mass)
        np.put_along_axis(exact, order, mass, axis=1)
        room = facts.rounding + 2.0**-38 * x.shape[1] + facts.eps * 4 * (4 + facts.entropy[:, None])
        maybe = maybe & (exact <= top_p + room)
        sure = sure & ((exact <= top_p - room) | (exact == 0))
    if top_k is not None:
        np.put_along_axis(above, order, first, axis=1)
        sure, maybe = sure & (above < top_k), maybe & (above < top_k)
    return sure, maybe
