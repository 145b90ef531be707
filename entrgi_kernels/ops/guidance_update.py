"""Backward of the blend and Adam in one: the N x V gradient never exists.

    d phi_v = p_v (g . E_v - g . soft) / tau        g = d loss/d embedding
    phi <- Adam(phi, d phi)                         bias-corrected, as torch.optim.Adam

In place on the logits and on the state; not differentiable.

Source: arXiv 2602.05000, the inner loop's gradient step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..backends.arguments import Adam
from . import _common
from ._operator import operator
from .entrgi_embedding import ForwardState

MOMENT_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def moment_dtype(logits: torch.dtype, wanted: torch.dtype | str | None = None) -> torch.dtype:
    """What Adam's moments are kept in: `wanted` or its name, else the logits' dtype, but float32 for float16.

    Raises:
        TypeError: another dtype, float16 among them. A gradient below 1e-2 has a second moment that becomes 0 there,
            and the step would be the first moment over eps.
    """
    if wanted is None:
        return torch.float32 if logits == torch.float16 else logits
    dtype = MOMENT_DTYPES.get(wanted) if isinstance(wanted, str) else wanted
    if not isinstance(dtype, torch.dtype) or dtype not in MOMENT_DTYPES.values():
        raise TypeError(
            f"Adam's moments in {wanted!r}: expected float64, float32 or bfloat16; squares underflow in float16"
        )
    return dtype


@dataclass
class AdamState:
    """First and second moment of every logit, and the number of steps taken.

    Attributes:
        exp_avg: [N, V], first moment; float64, float32 or bfloat16.
        exp_avg_sq: [N, V], second moment; as the first. Not float16, whose squares underflow.
        step: steps taken so far. At 0 the moments are taken as zero, whatever they hold.
    """

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int = 0

    @classmethod
    def zeros(cls, logits: torch.Tensor, dtype: torch.dtype | None = None) -> AdamState:
        """A fresh state for `logits` [N, V], of `dtype`; None takes the logits' own, float32 for float16.

        Raises:
            TypeError: `dtype` is float16, or not floating.
        """
        _common.check_logits(logits)
        if dtype is not None and dtype not in _common.FLOATS:
            raise TypeError(f"dtype={dtype!r}: expected None or one of {', '.join(map(str, _common.FLOATS))}")
        like: dict[str, Any] = dict(dtype=moment_dtype(logits.dtype, dtype), device=logits.device)
        size = tuple(logits.shape)
        return cls(torch.zeros(size, **like), torch.zeros(size, **like))


_TOUCHED = ("logits", "adam.exp_avg", "adam.exp_avg_sq", "grad", "table", "state.soft", "state.logsumexp")


@operator(
    mutates=("logits", "exp_avg", "exp_avg_sq"),
    numbers={"temperature": _common.distribution_temperature, "lr": _common.check_rate},
)
def _guidance_update_(
    logits: torch.Tensor,
    grad: torch.Tensor,
    table: torch.Tensor,
    soft: torch.Tensor,
    logsumexp: torch.Tensor,
    exp_avg: torch.Tensor | None,
    exp_avg_sq: torch.Tensor | None,
    step: int,
    temperature: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    keep: bool,
    backend: str,
) -> None:
    _common.check_apart(_TOUCHED, (logits, exp_avg, exp_avg_sq), grad, table, soft, logsumexp)
    adam = Adam(exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, keep)
    _common.run("guidance_update_", backend, logits)(logits, grad, table, soft, logsumexp, temperature, adam)


@_guidance_update_.register_fake
def _(*_):
    return None


def guidance_update_(
    logits: torch.Tensor,
    grad: torch.Tensor,
    table: torch.Tensor,
    state: ForwardState,
    *,
    lr: _common.Number,
    adam: AdamState | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    keep: bool = True,
    backend: str = "auto",
) -> None:
    """One Adam step of the logits down `grad`, in place.

    Args:
        logits: phi [N, V], changed in place, any strides without overlap; not requiring grad, unless
            under torch.no_grad().
        grad: d loss/d embedding [N, D], of the loss to be *minimised* (minus the sum of rewards).
        table: E [V, D], as in the forward.
        state: what :func:`entrgi_embedding` found of these logits, with these very values: it is good for one step.
        lr: learning rate, eta, at most 1e12; a number or a 0-d tensor on the CPU.
        adam: Adam's moments, changed in place; None takes a first step whose moments are not kept (M = 1).
        betas, eps: Adam's; eps from 1e-12 to 1e12.
        keep: False leaves `adam` as it is: for a last step, which then writes no moments.
        backend: "auto" or the name of a backend.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a bad hyper-parameter.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    _common.check_logits(logits)
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits require grad: expected phi.detach(), or a call under torch.no_grad()")
    _common.check_table(logits, table)
    if not isinstance(state, ForwardState):
        raise TypeError(f"state is {type(state).__name__}: expected the .state that entrgi_embedding returned")
    if not isinstance(keep, bool):
        raise TypeError(f"keep={keep!r} is {type(keep).__name__}: expected True or False")
    check_rows(grad, "grad", logits, table)
    check_rows(state.soft, "state.soft", logits, table)
    acc = _common.accumulation_dtype(logits, table)
    if state.soft.dtype != acc:
        raise TypeError(f"state.soft is {state.soft.dtype}: expected {acc}, as the forward left it")
    _common.check_vector(logits, state.logsumexp, "state.logsumexp", acc)
    tau = _common.positive(_common.check_temperature(state.temperature, "state.temperature"))
    lr, beta1, beta2, eps = hyperparameters(lr, betas, eps)
    moments: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
    step = 1
    if adam is not None:
        moments, step = _check_adam(adam, logits)
    _guidance_update_(
        logits,
        _common.detached(grad),
        _common.detached(table),
        _common.detached(state.soft),
        _common.detached(state.logsumexp),
        *moments,
        step,
        tau,
        lr,
        beta1,
        beta2,
        eps,
        keep,
        _common.check_backend(backend),
    )
    # Counted only after the step was taken: a call that raises leaves the moments as they were.
    if adam is not None and keep:
        adam.step += 1


def _check_adam(adam: AdamState, logits: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
    """(the moments, the number of the step to take); raise unless they are Adam's, for these logits."""
    if not isinstance(adam, AdamState):
        raise TypeError(f"adam is {type(adam).__name__}: expected None or an AdamState")
    if not _common.is_integer(adam.step):
        raise TypeError(f"adam.step={adam.step!r} is {type(adam.step).__name__}: expected an integer >= 0")
    if not 0 <= adam.step < (1 << 63) - 1:
        raise ValueError(f"adam.step={adam.step}: expected an integer >= 0 and < 2**63 - 1")
    moments = adam.exp_avg, adam.exp_avg_sq
    for name, moment in zip(("adam.exp_avg", "adam.exp_avg_sq"), moments, strict=True):
        if type(moment) is not torch.Tensor or moment.layout is not torch.strided or moment.dim() != 2:
            _common.check_matrix(moment, name, "[N, V], that of the logits")
        if moment.dtype is not logits.dtype:
            _common.check_dtype(moment, name)
        if moment.dtype == torch.float16:
            raise TypeError(
                f"{name} is {moment.dtype}, where squares underflow: expected float64, float32 or bfloat16, as "
                "AdamState.zeros(logits) makes them"
            )
        if moment.shape != logits.shape:
            raise ValueError(f"{name} has shape {list(moment.shape)}: expected {list(logits.shape)}, as the logits")
        if moment.device != logits.device:
            _common.check_same_device(logits, **{name: moment})
        if moment.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}.requires_grad is True: expected a tensor without gradient, it is changed in place"
            )
    if moments[0] is moments[1]:
        raise ValueError("adam.exp_avg_sq is adam.exp_avg: expected a tensor of its own, both are written")
    return moments, int(adam.step) + 1


def check_rows(tensor: torch.Tensor, name: str, logits: torch.Tensor, table: torch.Tensor) -> None:
    """Raise unless `tensor` has a row of the table's width for each row of the logits, and is where they are."""
    n, d = logits.shape[0], table.shape[1]
    _common.check_matrix(tensor, name, "[N, D], that of the embedding")
    if tensor.shape[0] != n or tensor.shape[1] != d:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [{n}, {d}], that of the embedding")
    if tensor.device != logits.device:
        _common.check_same_device(logits, **{name: tensor})


def hyperparameters(
    lr: _common.Number, betas: tuple[float, float], eps: float
) -> tuple[_common.Number, float, float, float]:
    """(lr, beta1, beta2, eps) in the operator's form; raises where Adam cannot take them."""
    lr, eps = _common.check_rate(lr), _common.check_eps(eps)
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas={betas!r} is {type(betas).__name__}: expected two numbers in [0, 1)")
    decay = [_common.check_number(beta, "betas", "two numbers in [0, 1)") for beta in betas]
    if len(decay) != 2 or not (0 <= decay[0] < 1 and 0 <= decay[1] < 1):
        raise ValueError(f"betas={betas}: expected two numbers in [0, 1)")
    return lr, decay[0], decay[1], eps
