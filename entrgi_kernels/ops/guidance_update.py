"""Backward of the blend and Adam in one: the N x V gradient never exists.

    d phi_v = p_v (g . E_v - g . soft) / tau        g = d loss/d embedding
    phi <- Adam(phi, d phi)                         bias-corrected, as torch.optim.Adam

In place on the logits and on the state; not differentiable.

Source: arXiv 2602.05000, the inner loop's gradient step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import _common


@dataclass
class AdamState:
    """First and second moment of every logit, and the number of steps taken.

    Attributes:
        exp_avg: [N, V], first moment.
        exp_avg_sq: [N, V], second moment.
        step: steps taken so far. At 0 the moments are taken as zero, whatever they hold.
    """

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int = 0

    @classmethod
    def zeros(cls, logits: torch.Tensor, dtype: torch.dtype | None = None) -> AdamState:
        """A fresh state for `logits` [N, V], of `dtype` (the logits' where None)."""
        size = tuple(logits.shape)
        return cls(*(torch.zeros(size, dtype=dtype or logits.dtype, device=logits.device) for _ in range(2)))


@torch.library.custom_op("entrgi::guidance_update_", mutates_args=("logits", "exp_avg", "exp_avg_sq"))
def _guidance_update_(
    logits: torch.Tensor,
    grad: torch.Tensor,
    embedding: torch.Tensor,
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
    _common.run("guidance_update_", backend, logits)(
        logits, grad, embedding, soft, logsumexp, exp_avg, exp_avg_sq, step, temperature, lr, beta1, beta2, eps, keep
    )


@_guidance_update_.register_fake
def _(
    logits,
    grad,
    embedding,
    soft,
    logsumexp,
    exp_avg,
    exp_avg_sq,
    step,
    temperature,
    lr,
    beta1,
    beta2,
    eps,
    keep,
    backend,
):
    return None


def guidance_update_(
    logits: torch.Tensor,
    grad_embedding: torch.Tensor,
    embedding: torch.Tensor,
    soft: torch.Tensor,
    logsumexp: torch.Tensor,
    *,
    lr: float,
    temperature: float = 1.0,
    state: AdamState | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    keep_state: bool = True,
    backend: str = "auto",
) -> None:
    """One Adam step of the logits down `grad_embedding`, in place.

    Args:
        logits: phi [N, V], changed in place, any strides without overlap; not requiring grad, unless
            under torch.no_grad().
        grad_embedding: d loss/d embedding [N, D], of the loss to be *minimised* (minus the sum of rewards).
        embedding: E [V, D], as in the forward.
        soft: [N, D], the forward's soft embedding (:class:`ForwardState`).
        logsumexp: [N], the forward's log-sum-exp at `temperature`.
        lr: learning rate, eta.
        temperature: tau of the forward; 0 stands for 1.
        state: Adam's moments, changed in place; None takes a first step whose state is not kept (M = 1).
        betas, eps: Adam's; eps > 0.
        keep_state: False leaves `state` as it is: for a last step, which then writes no moments.
        backend: "auto" or the name of a backend.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, or a bad hyper-parameter.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    _common.check_logits(logits)
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits require grad: expected phi.detach(), or a call under torch.no_grad()")
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            f"logits of shape {list(logits.shape)} have strides {list(logits.stride())}: expected one that owns each "
            "of its entries (clone an expanded one)"
        )
    _common.check_embedding(logits, embedding)
    shape = (logits.shape[0], embedding.shape[1])
    for name, tensor in (("grad_embedding", grad_embedding), ("soft", soft)):
        expected = f"{list(shape)}, that of the embedding"
        _common.check_matrix(tensor, name, expected)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {expected}")
    acc = _common.accumulation_dtype(logits, embedding)
    if soft.dtype != acc:
        raise TypeError(f"soft is {soft.dtype}: expected {acc}, as the forward left it")
    _common.check_vector(logits, logsumexp, "logsumexp", acc)
    _common.check_same_device(logits, grad_embedding=grad_embedding, soft=soft)
    lr = _common.check_number(lr, "lr", "a finite number >= 0")
    eps = _common.check_number(eps, "eps", "a finite number > 0")
    decay = [_common.check_number(beta, "betas", "two numbers in [0, 1)") for beta in betas]
    for name, value, ok, expected in (
        ("lr", lr, 0 <= lr < math.inf, "a finite number >= 0"),
        ("betas", betas, len(decay) == 2 and all(0 <= beta < 1 for beta in decay), "two numbers in [0, 1)"),
        # At 0 an entry without gradient, as those of -inf are, would become 0 / 0.
        ("eps", eps, 0 < eps < math.inf, "a finite number > 0"),
    ):
        if not ok:
            raise ValueError(f"{name}={value}: expected {expected}")
    if state is not None:
        for name, tensor in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            if tensor.shape != logits.shape or tensor.device != logits.device:
                raise ValueError(
                    f"state.{name} has shape {list(tensor.shape)} on {tensor.device}: expected {list(logits.shape)} on "
                    f"{logits.device}, as the logits"
                )
            _common.check_dtype(tensor, f"state.{name}")
    moments = (None, None) if state is None else (state.exp_avg, state.exp_avg_sq)
    _guidance_update_(
        logits,
        grad_embedding.detach(),
        embedding.detach(),
        soft,
        logsumexp,
        *moments,
        1 if state is None else state.step + 1,
        _common.distribution_temperature(temperature),
        lr,
        *decay,
        eps,
        bool(keep_state),
        _common.check_backend(backend),
    )
    # Counted only after the step was taken: a call that raises leaves the state as it was.
    if state is not None and keep_state:
        state.step += 1
