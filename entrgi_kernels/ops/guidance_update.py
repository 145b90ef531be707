"""Backward of the blend and Adam in one: the N x V gradient never exists.

    d phi_v = p_v (g . E_v - g . soft) / tau        g = d loss/d embedding
    phi <- Adam(phi, d phi)                         bias-corrected, as torch.optim.Adam

In place on the logits and on the state; not differentiable.

Source: arXiv 2602.05000, the inner loop's gradient step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..backends.arguments import Adam
from . import _common
from ._operator import operator
from .entrgi_embedding import ForwardState


def moment_dtype(logits: torch.dtype, wanted: torch.dtype | None = None) -> torch.dtype:
    """What Adam's moments are kept in: `wanted`, else the logits' dtype, but float32 for float16.

    Raises:
        TypeError: float16 is wanted. A gradient below 1e-2 has a second moment that becomes 0 there, and the step would
            be the first moment over eps.
    """
    if wanted == torch.float16:
        raise TypeError(
            f"Adam's moments in {wanted}: expected float64, float32 or bfloat16; squares underflow in float16"
        )
    return wanted or (torch.float32 if logits == torch.float16 else logits)


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
            TypeError: `dtype` is float16.
        """
        size, dtype = tuple(logits.shape), moment_dtype(logits.dtype, dtype)
        return cls(*(torch.zeros(size, dtype=dtype, device=logits.device) for _ in range(2)))


@operator(mutates=("logits", "exp_avg", "exp_avg_sq"))
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
    lr: float,
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
        lr: learning rate, eta; at most 1e12.
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
    if 0 in logits.stride() and any(
        n > 1 and stride == 0 for n, stride in zip(logits.shape, logits.stride(), strict=True)
    ):
        raise ValueError(
            f"logits of shape {list(logits.shape)} have strides {list(logits.stride())}: expected one that owns each "
            "of its entries (clone an expanded one)"
        )
    _common.check_table(logits, table)
    if not isinstance(state, ForwardState):
        raise TypeError(f"state is {type(state).__name__}: expected the .state that entrgi_embedding returned")
    _check_rows(grad, "grad", logits, table)
    _check_rows(state.soft, "state.soft", logits, table)
    acc = _common.accumulation_dtype(logits, table)
    if state.soft.dtype != acc:
        raise TypeError(f"state.soft is {state.soft.dtype}: expected {acc}, as the forward left it")
    _common.check_vector(logits, state.logsumexp, "state.logsumexp", acc)
    tau = _common.distribution_temperature(state.temperature)
    lr, beta1, beta2, eps = hyperparameters(lr, betas, eps)
    moments, step = (None, None), 1
    if adam is not None:
        moments, step = (adam.exp_avg, adam.exp_avg_sq), adam.step + 1
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            if moment.shape != logits.shape or moment.device != logits.device:
                raise ValueError(
                    f"adam.{name} has shape {list(moment.shape)} on {moment.device}: expected {list(logits.shape)} on "
                    f"{logits.device}, as the logits"
                )
            _common.check_dtype(moment, f"adam.{name}")
            if moment.dtype == torch.float16:
                raise TypeError(
                    f"adam.{name} is {moment.dtype}, where squares underflow: expected float64, float32 or bfloat16, "
                    "as AdamState.zeros(logits) makes them"
                )
    _guidance_update_(
        logits,
        _common.detached(grad),
        _common.detached(table),
        state.soft,
        state.logsumexp,
        *moments,
        step,
        tau,
        lr,
        beta1,
        beta2,
        eps,
        bool(keep),
        _common.check_backend(backend),
    )
    # Counted only after the step was taken: a call that raises leaves the moments as they were.
    if adam is not None and keep:
        adam.step += 1


def _check_rows(tensor: torch.Tensor, name: str, logits: torch.Tensor, table: torch.Tensor) -> None:
    """Raise unless `tensor` has a row of the table's width for each row of the logits, and is where they are."""
    n, d = logits.shape[0], table.shape[1]
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        _common.check_matrix(tensor, name, f"[{n}, {d}], that of the embedding")
    if tensor.shape[0] != n or tensor.shape[1] != d:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [{n}, {d}], that of the embedding")
    _common.check_dtype(tensor, name)
    if tensor.device != logits.device:
        _common.check_same_device(logits, **{name: tensor})


def hyperparameters(lr: float, betas: tuple[float, float], eps: float) -> tuple[float, float, float, float]:
    """(lr, beta1, beta2, eps) as floats; raises where Adam cannot take them."""
    lr, eps = _common.check_rate(lr), _common.check_eps(eps)
    decay = [_common.check_number(beta, "betas", "two numbers in [0, 1)") for beta in betas]
    if len(decay) != 2 or not (0 <= decay[0] < 1 and 0 <= decay[1] < 1):
        raise ValueError(f"betas={betas}: expected two numbers in [0, 1)")
    return lr, decay[0], decay[1], eps
