"""The whole forward of one guidance step: the entropy-weighted blend of soft and hard embeddings.

    q = softmax(phi)      H = -sum_v q_v log q_v      w = H / log V
    p = softmax(phi / tau)      soft = p @ E      x ~ filtered p
    e = soft + stop_gradient( w (E[x] - soft) )

The value is (1 - w) soft + w E[x]; the gradient is that of `soft`, unscaled: d phi_v = p_v (g . E_v - g . soft) / tau.
w and x carry no gradient.

With `out` and `index` the rows of the blend are written to their places among others: a reward model's input holds them
and the embeddings of committed tokens. That form is not differentiable, as torch's own `out=` is not: the gradient of
the rows written is what :func:`guidance_update_` takes.

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
        embedding: [N, D] of the table's dtype, the blend; `out` itself where it was given.
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
    return embedding.new_empty((logits.shape[0], embedding.shape[1])), *_beside_the_blend(logits, embedding)


def _beside_the_blend(logits: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tokens, weight, entropy, soft, log-sum-exp and argmax, without content."""
    n, acc = logits.shape[0], _common.accumulation_dtype(logits, embedding)
    statistic = logits.new_empty((n,), dtype=acc)
    index = logits.new_empty((n,), dtype=torch.int64)
    soft = embedding.new_empty((n, embedding.shape[1]), dtype=acc)
    return index, statistic, torch.empty_like(statistic), soft, torch.empty_like(statistic), torch.empty_like(index)


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


@torch.library.custom_op("entrgi::entrgi_embedding_out", mutates_args=("out",))
def _entrgi_embedding_out(
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
    out: torch.Tensor,
    index: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _common.check_apart(out, "out", logits=logits, embedding=embedding)
    run = _common.run("entrgi_embedding", backend, logits)
    return run(logits, embedding, rng, rows, tokens, weight, weight_mode, temperature, top_k, top_p, out, index)[1:]


@_entrgi_embedding_out.register_fake
def _(logits, embedding, rng, rows, tokens, weight, weight_mode, temperature, top_k, top_p, out, index, backend):
    return _beside_the_blend(logits, embedding)


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
    out: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
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
    if out is not None or index is not None:
        _check_destination(logits, embedding, out, index)
    mode, given = _weight(logits, weight, backend)
    if tokens is None and mode != "zero" and draw_temperature == 0:
        # The draw's temperature is 0 while the distribution's is 1: the tokens have to come from outside.
        tokens = torch.ops.entrgi.sample_tokens(logits, rng, keys, 0.0, k, p, backend)
    # Detached: a table that requires grad would otherwise start a backward that has nothing to give it.
    arguments = logits, embedding.detach(), rng, keys, tokens, given, mode, tau, k, p
    if out is None or index is None:
        out, *others = _entrgi_embedding(*arguments, backend)
    else:
        others = _entrgi_embedding_out(*arguments, out, index, backend)
    return EntrgiEmbedding(out, *others[:3]), ForwardState(*others[3:])


def _check_destination(
    logits: torch.Tensor, embedding: torch.Tensor, out: torch.Tensor | None, index: torch.Tensor | None
) -> None:
    """Raise unless rows of the blend can be written to `out` at `index`."""
    if out is None or index is None:
        given, lacking = ("index", "out") if out is None else ("out", "index")
        raise ValueError(f"{given} is given and {lacking}=None: expected both, out [M, D] and index [N], or neither")
    expected = f"[M, {embedding.shape[1]}], as wide as the embedding"
    _common.check_matrix(out, "out", expected)
    if out.shape[1] != embedding.shape[1]:
        raise ValueError(f"out has shape {list(out.shape)}: expected {expected}")
    if out.dtype != embedding.dtype:
        raise TypeError(f"out is {out.dtype}: expected {embedding.dtype}, as the embedding")
    (rows, columns), (stride, inner) = out.shape, out.stride()
    if (columns > 1 and inner != 1) or (rows > 1 and stride < columns):
        raise ValueError(f"out has strides {list(out.stride())}: expected dense rows that do not overlap")
    _common.check_same_device(logits, out=out)
    _common.check_vector(logits, index, "index", torch.int64)
    for name, tensor in (("logits", logits), ("out", out)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}.requires_grad is True, but with out= nothing is differentiable: expected {name}.detach(), or "
                "a call under torch.no_grad()"
            )


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
    out: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
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
        out: [M, D] of the embedding's dtype, dense rows at any distance: row i of the blend is written to
            ``out[index[i]]`` and the rest of it is left alone. Not differentiable: neither it nor the logits may
            require grad, unless under torch.no_grad(). It shares no memory with logits or embedding.
        index: int64 [N], different rows of `out`; where some are the same, each entry there is that of one of them. One
            outside of [0, M) raises an IndexError on a CPU; on a GPU nobody looks (that would mean waiting for it): the
            Triton backend leaves such a row out, the eager one fails in torch's own assertion.
        backend: "auto" or the name of a backend.

    Returns:
        :class:`EntrgiEmbedding`. Statistics are NaN and the token is -1 for a row that holds a NaN or +inf, or no
        finite entry.

    Raises:
        ValueError, TypeError: bad shape, dtype, device, temperature, filter, weight, seed or keys; `out` without
            `index` or the reverse; an `out` whose rows overlap, or that shares memory with what is read.
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
        out=out,
        index=index,
        backend=backend,
    )[0]
