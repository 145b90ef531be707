"""A reward's linear part around the tokens it was read at, added to the logits: the N x V change never exists.

    phi_v <- phi_v + scale (g . E_v - g . E_x)        g = d reward/d embedding, taken where the row holds token x

By Taylor's formula g . (E_v - E_x) is what the reward gains, to first order, when x is replaced by v. softmax(phi) is
then tilted by exp(scale gain): Bayes' rule, exact for a reward that is linear in the embeddings. g . E_x is one number
a row, which no softmax notices; a ranking by raw logits ("anchor") does.

In place on the logits; not differentiable.

Source: arXiv 2412.10193, the first-order approximation of D-CBG; arXiv 2406.01572, Taylor-approximated guidance (TAG).
"""

from __future__ import annotations

import torch

from . import _common
from ._operator import operator
from .guidance_update import check_rows

_TOUCHED = ("logits", "grad", "table", "tokens")


@operator(mutates=("logits",), numbers={"scale": _common.check_scale})
def _first_order_update_(
    logits: torch.Tensor, grad: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor, scale: float, backend: str
) -> None:
    _common.check_apart(_TOUCHED, (logits,), grad, table, tokens)
    _common.run("first_order_update_", backend, logits)(logits, grad, table, tokens, scale)


@_first_order_update_.register_fake
def _(*_):
    return None


def first_order_update_(
    logits: torch.Tensor,
    grad: torch.Tensor,
    table: torch.Tensor,
    tokens: torch.Tensor,
    *,
    scale: _common.Number,
    backend: str = "auto",
) -> None:
    """Add a reward's linear part around `tokens` to the logits, in place.

    Args:
        logits: phi [N, V], changed in place, any strides without overlap; not requiring grad, unless
            under torch.no_grad().
        grad: d reward/d embedding [N, D], to be moved *up*; taken where row i of the reward's input is
            ``table[tokens[i]]``.
        table: E [V, D], the reward model's table seen through the vocabulary map.
        tokens: int64 [N]. Where one is none of the V, as the -1 of a bad row, its row of the logits becomes NaN.
        scale: gamma, from -1e12 to 1e12; a number or a 0-d tensor on the CPU. With the gradient of a loss pass -gamma.
        backend: "auto" or the name of a backend.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, a bad scale, or logits that share memory with the rest.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    _common.check_logits(logits)
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits require grad: expected phi.detach(), or a call under torch.no_grad()")
    _common.check_table(logits, table)
    check_rows(grad, "grad", logits, table)
    _common.check_vector(logits, tokens, "tokens", torch.int64)
    _first_order_update_(
        logits,
        _common.detached(grad),
        _common.detached(table),
        tokens,
        _common.check_scale(scale),
        _common.check_backend(backend),
    )
