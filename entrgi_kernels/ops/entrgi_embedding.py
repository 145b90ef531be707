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

from ..backends.arguments import Draw, Placement
from ..names import WEIGHT_MODES
from . import _common
from ._operator import operator
from .soft_embedding import _soft_embedding_backward
from .softmax_entropy import _softmax_entropy

Weight = str | torch.Tensor | Callable[[torch.Tensor, int], torch.Tensor]


class ForwardState(NamedTuple):
    """What the forward knew of the logits, as :func:`guidance_update_` takes it. Good for one step: that moves them.

    Attributes:
        soft: [N, D] float32 or float64, the soft embedding.
        logsumexp: [N] float32 or float64, of logits / temperature.
        argmax: [N] int64, each row's most likely token; means nothing where the row is bad.
        temperature: tau of the soft embedding; under torch.compile the 0-d tensor where one was given.
    """

    soft: torch.Tensor
    logsumexp: torch.Tensor
    argmax: torch.Tensor
    temperature: _common.Number

    def rows(self, index: torch.Tensor) -> ForwardState:
        """The state of some rows, int64 [n]."""
        return ForwardState(self.soft[index], self.logsumexp[index], self.argmax[index], self.temperature)


class EntrgiEmbedding(NamedTuple):
    """What :func:`entrgi_embedding` returns.

    Attributes:
        embedding: [N, D] of the table's dtype, the blend; `out` itself where it was given.
        tokens: [N] int64, the hard tokens; -1 where none was drawn (weight "zero") or the row is bad.
        weight: [N] float32 or float64, the hard token's share.
        entropy: [N] float32 or float64, nats, at temperature 1 and unfiltered.
        state: what a :func:`guidance_update_` of these logits takes.
    """

    embedding: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor
    entropy: torch.Tensor
    state: ForwardState


@operator(numbers={"temperature": _common.check_temperature, "top_p": _common.check_top_p})
def _entrgi_embedding(
    logits: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    keys: torch.Tensor,
    tokens: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_mode: str,
    temperature: float,
    top_k: int,
    top_p: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = Draw(rng, keys, temperature, top_k, top_p)
    tokens, draw = _drawn(logits, draw, tokens, weight_mode, backend)
    run = _common.run("entrgi_embedding", backend, logits)
    try:
        return run(logits, table, draw, tokens, weight, weight_mode)
    except IndexError as error:
        raise _out_of_range(table, tokens) from error


def _out_of_range(
    table: torch.Tensor,
    tokens: torch.Tensor | None,
    out: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> IndexError:
    """The error that names what lies outside of the table or of `out`."""
    if tokens is not None and bool((tokens >= table.shape[0]).any()):
        return IndexError(f"tokens holds {int(tokens.max())}: expected ids below {table.shape[0]}, the table's rows")
    assert out is not None and index is not None
    bad = index[(index < 0) | (index >= out.shape[0])]
    return IndexError(f"index holds {bad[:1].tolist()}: expected a row of out, which has {out.shape[0]}")


def _drawn(
    logits: torch.Tensor, draw: Draw, tokens: torch.Tensor | None, weight_mode: str, backend: str
) -> tuple[torch.Tensor | None, Draw]:
    """(tokens, draw) for the backends, whose forward has one temperature, above 0.

    At temperature 0 the draw's is 0 while the distribution's is 1: the tokens have to come from outside.
    """
    if draw.temperature != 0:
        return tokens, draw
    if tokens is None and weight_mode != "zero":
        tokens = _common.run("sample_tokens", backend, logits)(logits, draw)
    return tokens, draw._replace(temperature=1.0)


@_entrgi_embedding.register_fake
def _(logits, table, *_):
    return table.new_empty((logits.shape[0], table.shape[1])), *_beside_the_blend(logits, table)


def _beside_the_blend(logits: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tokens, weight, entropy, soft, log-sum-exp and argmax, without content."""
    n, acc = logits.shape[0], _common.accumulation_dtype(logits, table)
    statistic = logits.new_empty((n,), dtype=acc)
    index = logits.new_empty((n,), dtype=torch.int64)
    soft = table.new_empty((n, table.shape[1]), dtype=acc)
    return index, statistic, torch.empty_like(statistic), soft, torch.empty_like(statistic), torch.empty_like(index)


def _setup_context(ctx, inputs, output):
    logits, table, *_, temperature, _top_k, _top_p, backend = inputs
    _, tokens, weight, entropy, soft, lse, argmax = output
    ctx.temperature, ctx.backend = _common.positive(temperature), backend
    ctx.mark_non_differentiable(tokens, weight, entropy, soft, lse, argmax)
    ctx.save_for_backward(logits, table, soft, lse)


def _backward(ctx, grad, *_):
    logits, table, soft, lse = ctx.saved_tensors
    grad_logits = _soft_embedding_backward(logits, table, grad, soft, lse, ctx.temperature, ctx.backend)
    return grad_logits, *[None] * 10


_entrgi_embedding.register_autograd(_backward, setup_context=_setup_context)


_TOUCHED = ("out", "logits", "table", "weight", "tokens", "keys", "index")


@operator(mutates=("out",), numbers={"temperature": _common.check_temperature, "top_p": _common.check_top_p})
def _entrgi_embedding_out(
    logits: torch.Tensor,
    table: torch.Tensor,
    rng: torch.Tensor,
    keys: torch.Tensor,
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
    _common.check_apart(_TOUCHED, [out], logits, table, weight, tokens, keys, index)
    tokens, draw = _drawn(logits, Draw(rng, keys, temperature, top_k, top_p), tokens, weight_mode, backend)
    run = _common.run("entrgi_embedding", backend, logits)
    try:
        return run(logits, table, draw, tokens, weight, weight_mode, Placement(out, index))[1:]
    except IndexError as error:
        raise _out_of_range(table, tokens, out, index) from error


@_entrgi_embedding_out.register_fake
def _(logits, table, *_):
    return _beside_the_blend(logits, table)


def _check_destination(
    logits: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None, index: torch.Tensor | None
) -> None:
    """Raise unless rows of the blend can be written to `out` at `index`."""
    if out is None or index is None:
        given, lacking = ("index", "out") if out is None else ("out", "index")
        raise ValueError(f"{given} is given and {lacking}=None: expected both, out [M, D] and index [N], or neither")
    expected = f"[M, {table.shape[1]}], as wide as the table"
    _common.check_matrix(out, "out", expected)
    if out.shape[1] != table.shape[1]:
        raise ValueError(f"out has shape {list(out.shape)}: expected {expected}")
    if out.dtype != table.dtype:
        raise TypeError(f"out is {out.dtype}: expected {table.dtype}, as the table")
    (rows, columns), (stride, inner) = out.shape, out.stride()
    if (columns > 1 and inner != 1) or (rows > 1 and stride < columns):
        raise ValueError(f"out has strides {list(out.stride())}: expected dense rows that do not overlap")
    if rows == 0 and logits.shape[0] > 0:
        raise ValueError(f"out has 0 rows for {logits.shape[0]} of the blend: expected {expected}, with M >= 1")
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
        if weight not in WEIGHT_MODES:
            raise ValueError(
                f"weight={weight!r}: expected one of {', '.join(map(repr, WEIGHT_MODES))}, a tensor [N], or a "
                "callable of (entropy [N] in nats, V)"
            )
        return weight, None
    if callable(weight) and not isinstance(weight, torch.Tensor):
        entropy = _softmax_entropy(_common.detached(logits), 1.0, backend)[1]
        weight = weight(entropy, logits.shape[1])
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight is {type(weight).__name__}: expected a name, a tensor [N], or a callable giving one")
    _common.check_vector(logits, weight, "weight")
    _common.check_dtype(weight, "weight")
    return "given", _common.detached(weight)


def entrgi_embedding(
    logits: torch.Tensor,
    table: torch.Tensor,
    *,
    temperature: _common.Number = 1.0,
    weight: Weight = "entropy",
    tokens: torch.Tensor | None = None,
    top_k: int | None = None,
    top_p: _common.Number | None = None,
    seed: int | torch.Tensor = 0,
    counter: int | torch.Tensor = 0,
    keys: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    backend: str = "auto",
) -> EntrgiEmbedding:
    """The entropy-weighted blend of soft and hard embeddings. Differentiable once, in `logits` alone.

    Args:
        logits: phi [N, V], float64/float32/bfloat16/float16, any strides; -inf entries have probability 0.
        table: E [V, D], the reward model's table seen through the vocabulary map; no gradient is formed for it.
        temperature: tau of the soft embedding and the draw, from 1e-12 to 1e12; a number or a 0-d tensor on
            the CPU; at 0 the draw is the argmax and the
            soft embedding's temperature is 1.
        weight: "entropy" (EntRGi), "one" (APS), "zero" (Expectation), a tensor [N], or a callable of (entropy [N] in
            nats, V) that returns one. No gradient flows through it.
        tokens: int64 [N], the hard tokens; None draws them. One of V or more raises an IndexError on a CPU.
        top_k, top_p, seed, counter, keys: of the draw, as in :func:`sample_tokens`.
        out: [M, D] of the table's dtype, dense rows at any distance: row i of the blend is written to
            ``out[index[i]]`` and the rest of it is left alone. Not differentiable: neither it nor the logits may
            require grad, unless under torch.no_grad(). It shares no memory with logits or table.
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
    _common.check_logits(logits)
    _common.check_table(logits, table)
    _common.check_backend(backend)
    temperature = _common.check_temperature(temperature)
    k, p = _common.check_filters(top_k, top_p)
    rng, keys = _common.make_rng(logits, seed, counter), _common.make_keys(logits, keys)
    if tokens is not None:
        _common.check_vector(logits, tokens, "tokens", torch.int64)
    if out is not None or index is not None:
        _check_destination(logits, table, out, index)
    mode, given = _weight(logits, weight, backend)
    # Detached: a table that requires grad would otherwise start a backward that has nothing to give it.
    arguments = logits, _common.detached(table), rng, keys, tokens, given, mode, temperature, k, p
    if out is None or index is None:
        out, *others = _entrgi_embedding(*arguments, backend)
    else:
        others = _entrgi_embedding_out(*arguments, out, index, backend)
    drawn, share, entropy, soft, logsumexp, argmax = others
    state = ForwardState(soft, logsumexp, argmax, _common.positive(temperature))
    return EntrgiEmbedding(out, drawn, share, entropy, state)
