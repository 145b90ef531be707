"""What several raw functions take together, under one name each: made once a call by the operators.

One more number of the draw or of Adam is a field here, and is named again only where it is used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Draw(NamedTuple):
    """How hard tokens are drawn from softmax(logits / temperature).

    Attributes:
        rng: int64 [2], (seed, counter), on the logits' device.
        keys: int64 [N], what each row's draw is keyed by.
        temperature: > 0, or 0 for the argmax where only tokens are wanted.
        top_k, top_p: filters; 0 and 1.0 keep all.
    """

    rng: torch.Tensor
    keys: torch.Tensor
    temperature: float
    top_k: int
    top_p: float


class Adam(NamedTuple):
    """One step of torch.optim.Adam, with bias correction.

    Attributes:
        exp_avg, exp_avg_sq: moments [N, V]; may be absent at step 1, which takes them as zero whatever they hold.
        step: counted from 1.
        lr, beta1, beta2, eps: hyper-parameters.
        keep: whether the moments are written.
    """

    exp_avg: torch.Tensor | None
    exp_avg_sq: torch.Tensor | None
    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    keep: bool = True


class Placement(NamedTuple):
    """Where rows of a result go: row i to ``out[rows[i]]``; the rest of `out` is left alone.

    Attributes:
        out: [M, D] of the table's dtype, dense rows.
        rows: int64 [N].
    """

    out: torch.Tensor
    rows: torch.Tensor
