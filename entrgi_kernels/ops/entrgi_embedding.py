"""The whole forward of one guidance step: the entropy-weighted blend of soft and hard embeddings.

    q = softmax(phi)      H = -sum_v q_v log q_v      w = H / log V
    p = softmax(phi / tau)      soft = p @ E      x ~ filtered p
    e = soft + stop_gradient( w (E[x] - soft) )

The value is (1 - w) soft + w E[x]; the gradient is that of `soft`, unscaled: d phi_v = p_v (g . E_v - g . soft) / tau.
w and x carry no gradient.

Source: arXiv 2602.05000, the method's interpolation; w = 1 is APS, w = 0 the continuous relaxation (Expectation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import _common
from .soft_embedding import _soft_embedding_backward

Weight = str | torch.Tensor | Callable[[torch.Tensor, int], torch.Tensor]
WEIGHTS = ("entropy", "one", "zero")


class EntrgiEmbedding(NamedTuple):
    """What :func:`entrgi_embedding` returns.

    Attributes:
        embedding: [N, D] of the table's dtype, the blend.
        tokens: [N] int64, the hard tokens; -1 where none was drawn (weight "zero") or the row is bad.
        weight: [N] float32 or float64, the hard token's share.
        entropy: [N] float32 or float64, nats, at temperature 1 and unfiltered.
    """

    embedding: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor
    entropy: torch.Tensor


class ForwardState(NamedTuple):
    """What the forward leaves for :func:`guidance_update_` (soft [N, D], logsumexp [N]), and each row's argmax [N]."""

    soft: torch.Tensor
    logsumexp: torch.Tensor
    argmax: torch.Tensor


@torch.library.custom_op("entrgi::entrgi_embedding", mutates_args=())
def _entrgi_embedding(
    logits: torch.Tensor,
    embedding: torch.Tensor,
    rng: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_mode: str,
    temperature: float,
    top_k: int,
    top_p: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    run = _common.run("entrgi_embedding", backend, logits)
    return run(logits, embedding, rng, rows, tokens, weight, weight_mode, temperature, top_k, top_p)


@_entrgi_embedding.register_fake
def _(logits, embedding, rng, rows, tokens, weight, weight_mode, temperature, top_k, top_p, backend):
    n, acc = logits.shape[0], _common.accumulation_dtype(logits, embedding)
    out = embedding.new_empty((n, embedding.shape[1]))
    statistic = logits.new_empty((n,), dtype=acc)
    index = logits.new_empty((n,), dtype=torch.int64)
    soft = torch.empty_like(out, dtype=acc)
    return (
        out,
        index,
        statistic,
        torch.empty_like(statistic),
        soft,
        torch.empty_like(statistic),
        torch.empty_like(index),
    )


def _setup_context(ctx, inputs, output):
    logits, embedding, *_, temperature, _top_k, _top_p, backend = inputs
    _, tokens, weight, entropy, soft, lse, argmax = output
    ctx.temperature, ctx.backend = temperature, backend
    ctx.mark_non_differentiable(tokens, weight, entropy, soft, lse, argmax)
    ctx.save_for_backward(logits, embedding, soft, lse)


def _backward(ctx, grad, *_):
    logits, embedding, soft, lse = ctx.saved_tensors
    grad_logits = _soft_embedding_backward(logits, embedding, grad, soft, lse, ctx.temperature, ctx.backend)
    return grad_logits, *[None] * 10


_entrgi_embedding.register_autograd(_backward, setup_context=_setup_context)


def forward(
    logits: torch.Tensor,
    embedding: torch.Tensor,
    *,
    temperature: float = 1.0,
    weight: Weight = "entropy",
    tokens: torch.Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | torch.Tensor = 0,
    step: int | torch.Tensor = 0,
    rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[EntrgiEmbedding, ForwardState]:
    """:func:`entrgi_embedding` with what a following :func:`guidance_update_` needs; same arguments."""
    _common.check_logits(logits)
    _common.check_embedding(logits, embedding)
    _common.check_backend(backend)
    draw_temperature = _common.check_temperature(temperature)
    tau = _common.distribution_temperature(temperature)
    k, p = _common.check_filters(top_k, top_p)
    rng, keys = _common.make_rng(logits, seed, step), _common.make_rows(logits, rows)
    if tokens is not None:
        _common.check_vector(logits, tokens, "tokens", torch.int64)
    mode, given = _weight(logits, weight, backend)
    if tokens is None and mode != "zero" and draw_temperature == 0:
        # The draw's temperature is 0 while the distribution's is 1: the tokens have to come from outside.
        tokens = torch.ops.entrgi.sample_tokens(logits, rng, keys, 0.0, k, p, backend)
    # Detached: a table that requires grad would otherwise start a backward that has nothing to give it.
    outputs = _entrgi_embedding(logits, embedding.detach(), rng, keys, tokens, given, mode, tau, k, p, backend)
    return EntrgiEmbedding(*outputs[:4]), ForwardState(*outputs[4:])


def _weight(logits: torch.Tensor, weight: Weight, backend: str) -> tuple[str, torch.Tensor | None]:
    """(mode, values): the backends' form of the caller's weight."""
    if isinstance(weight, str):
        if weight not in WEIGHTS:
            raise ValueError(
                f"weight={weight!r}: expected one of {', '.join(map(repr, WEIGHTS))}, a tensor [N], or a callable of "
                "(entropy [N] in nats, V)"
            )
        return weight, None
    if callable(weight) and not isinstance(weight, torch.Tensor):
        entropy = torch.ops.entrgi.softmax_entropy(logits.detach(), 1.0, backend)[1]
        weight = weight(entropy, logits.shape[1])
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight is {type(weight).__name__}: expected a name, a tensor [N], or a callable giving one")
    _common.check_vector(logits, weight, "weight")
    _common.check_dtype(weight, "weight")
    return "given", weight.detach()


def entrgi_embedding(
    logits: torch.Tensor,
    embedding: torch.Tensor,
    *,
    temperature: float = 1.0,
    weight: Weight = "entropy",
    tokens: torch.Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | torch.Tensor = 0,
    step: int | torch.Tensor = 0,
    rows: torch.Tensor | None = None,
    backend: str = "auto",
) -> EntrgiEmbedding:
    """The entropy-weighted blend of soft and hard embeddings. Differentiable once, in `logits` alone.

    Args:
        logits: phi [N, V], float64/float32/bfloat16/float16, any strides; -inf entries have probability 0.
        embedding: E [V, D], the reward model's table seen through the vocabulary map; no gradient is formed for it.
        temperature: tau >= 0 of the soft embedding and the draw; at 0 the draw is the argmax and the soft embedding's
            temperature is 1.
        weight: "entropy" (EntRGi), "one" (APS), "zero" (Expectation), a tensor [N], or a callable of (entropy [N] in
            nats, V) that returns one. No gradient flows through it.
        tokens: int64 [N], the hard tokens; None draws them.
        top_k, top_p, seed, step, rows: of the draw, as in :func:`sample_tokens`.
        backend: "auto" or the name of a backend.

    Returns:
        :class:`EntrgiEmbedding`. Statistics are NaN and the token is -1 for a row that holds a NaN or +inf, or no
        finite entry.

    Raises:
        ValueError, TypeError: bad shape, dtype, device, temperature, filter, weight, seed or keys.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    return forward(
        logits,
        embedding,
        temperature=temperature,
        weight=weight,
        tokens=tokens,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        step=step,
        rows=rows,
        backend=backend,
    )[0]
