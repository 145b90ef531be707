"""The operators in plain torch: the oracle that every other backend is tested against.

Clarity and accuracy come before speed. Statistics and sums are float32 (float64 for float64 inputs) whatever the dtype
of the logits; wherever the table of embeddings would have to be copied in a wider dtype the vocabulary is walked in
chunks, so that a call needs a few N x V buffers and never a second table.

Conventions shared by all backends. N rows, V vocabulary entries, D embedding width. "acc" is float64 when the logits
or the table are float64, else float32. A row is *bad* when it holds a NaN or +inf, or no finite entry: its token is -1
and its statistics are NaN; nothing raises, so that a caller on a GPU need not wait for the answer. Entries of -inf have
probability 0, gradient 0 and are never drawn. ``top_k = 0`` and ``top_p = 1.0`` mean no filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from . import philox
from .arguments import Adam, Draw, Placement

NAME = "eager"
# Elements of a temporary that a chunk may hold: 2^22 float32 are 16 MiB.
CHUNK_ELEMENTS = 1 << 22


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve a device and dtype; None, since plain torch serves all."""
    return None


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 when one of the tensors is, else float32: the dtype of statistics and of sums."""
    for tensor in tensors:  # a plain loop: every call of an operator comes by here
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _slices(total: int, width: int) -> Iterator[slice]:
    """Slices over `total` such that a slice times `width` stays within the chunk budget."""
    size = max(1, CHUNK_ELEMENTS // max(1, width))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _shifted(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """((logits - row maximum) / temperature, row maximum), the maximum NaN for a bad row."""
    maximum = logits.amax(dim=-1)
    maximum = torch.where(maximum.isfinite(), maximum, maximum.new_full((), math.nan))
    return (logits - maximum[:, None]) / temperature, maximum


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in their own precision: a caller's autocast would take it down to bfloat16."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _distribution(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities [N, V], log-sum-exp [N] and entropy [N] of softmax(logits / temperature), logits in acc."""
    shifted, maximum = _shifted(logits, temperature)
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    # 0 * -inf is NaN: entries without mass add nothing to the entropy.
    product = torch.where(weights > 0, weights * shifted, weights)
    entropy = (total.log() - product.sum(dim=-1) / total).clamp(min=0)
    return weights / total[:, None], maximum / temperature + total.log(), entropy


def _normaliser(logits: torch.Tensor, lse: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift, rest) [N, 1] with log p = (logits - shift) / temperature - rest, logits in acc.

    `lse` alone would do, were it exact: of logits / temperature around 1e5 its rounding is a percent of every p. So
    only what it is apart from these logits' own, as that of a wider matrix is, is taken from it.
    """
    shifted, maximum = _shifted(logits, temperature)
    logsum = shifted.exp_().sum(dim=-1).log()
    own = maximum / temperature + logsum
    one = torch.isclose(lse, own, rtol=4 * torch.finfo(own.dtype).eps, atol=0)
    rest = logsum + torch.where(one, torch.zeros_like(own), lse - own)
    bad = maximum.isnan()  # or columns of -inf alone, of a wider matrix
    return maximum.masked_fill(bad, 0)[:, None], torch.where(bad, lse, rest)[:, None]


def softmax_entropy(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp [N], entropy [N] in nats) of softmax(logits / temperature), both acc."""
    _, lse, entropy = _distribution(logits.to(accumulation_dtype(logits)), temperature)
    return lse, entropy


def softmax_entropy_backward(
    logits: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_lse: torch.Tensor,
    grad_entropy: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """d lse/d logits = p / tau, d H/d logits = -p (log p + H) / tau; [N, V] of the logits' dtype."""
    x = logits.to(lse.dtype)
    shift, rest = _normaliser(x, lse, temperature)
    log_p = (x - shift) / temperature - rest
    p = log_p.exp()
    surprise = torch.where(p > 0, log_p, torch.zeros_like(log_p)) + entropy[:, None]
    # Contiguous whatever the strides of the logits: the layout that the operator's fake promises.
    return (p * (grad_lse[:, None] - grad_entropy[:, None] * surprise) / temperature).to(logits.dtype).contiguous()


def filter_threshold(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The smallest logit [N] that top-p and top-k keep: an entry is kept iff its logit is at least that.

    Top-p keeps an entry iff the mass of entries with a strictly larger logit is at most `top_p`: the smallest set whose
    mass reaches p, and all ties of its smallest member. Top-k keeps all ties of the k-th largest. Both keep the upper
    end of the row, so one after the other is the larger of the two thresholds.
    """
    threshold = logits.new_full((logits.shape[0],), -math.inf)
    if top_p < 1.0:
        ranked = logits.sort(dim=-1, descending=True).values
        mass = _distribution(ranked.double(), temperature)[0].cumsum(dim=-1)
        better = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
        # The first of several ties has the least mass above it: where any is kept, their common value is.
        kept = better <= top_p
        kept[:, 0] = True
        threshold = ranked.masked_fill(~kept, math.inf).amin(dim=-1)
    if 0 < top_k < logits.shape[-1]:
        threshold = torch.maximum(threshold, logits.topk(top_k, dim=-1).values[:, -1])
    return threshold


def sample_tokens(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Tokens [N] int64 drawn from the filtered softmax(logits / temperature); argmax at temperature 0; -1 if bad.

    An exponential race: the largest (logit - maximum) / temperature - log(E) wins, E standard exponential from Philox.
    """
    n, v = logits.shape
    acc = accumulation_dtype(logits)
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    for part in _slices(n, v):
        x = logits[part].to(acc)
        if draw.temperature == 0:
            winner, maximum = x.argmax(dim=-1), x.amax(dim=-1)
        else:
            threshold = filter_threshold(x, draw.temperature, draw.top_k, draw.top_p)
            shifted, maximum = _shifted(x, draw.temperature)
            kept = (x >= threshold[:, None]) & (shifted > -math.inf)
            row, index = kept.nonzero(as_tuple=True)
            noise = philox.exponential(draw.rng, draw.keys[part][row], index, acc).log()
            score = torch.full_like(x, -math.inf)
            score[row, index] = shifted[row, index] - noise
            winner = score.argmax(dim=-1)
        tokens[part] = torch.where(maximum.isfinite(), winner, -1)
    return tokens


def soft_embedding(logits: torch.Tensor, table: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax(logits / temperature) @ table [N, D] in acc, log-sum-exp [N] in acc)."""
    acc = accumulation_dtype(logits, table)
    p, lse, _ = _distribution(logits.to(acc), temperature)
    return _expectation(p, table), lse


def _expectation(p: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    soft = p.new_zeros(p.shape[0], table.shape[1])
    for part in _slices(*table.shape):
        soft.addmm_(p[:, part], table[part].to(p.dtype))
    return soft


def soft_embedding_backward(
    logits: torch.Tensor,
    table: torch.Tensor,
    grad: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """d loss/d logits [N, V] of the logits' dtype, from `grad` = d loss/d soft embedding [N, D]."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for part, chunk in _logit_gradient(logits, table, grad, soft, lse, temperature):
        out[:, part] = chunk.to(out.dtype)
    return out


def _logit_gradient(
    logits: torch.Tensor,
    table: torch.Tensor,
    grad: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Chunks over V of p (grad . E - grad . soft) / temperature, in acc."""
    grad = grad.to(soft.dtype)
    baseline = (grad * soft).sum(dim=-1, keepdim=True)
    shift, rest = _normaliser(logits.to(soft.dtype), lse, temperature)
    for part in _slices(table.shape[0], max(table.shape[1], logits.shape[0])):
        p = ((logits[:, part].to(soft.dtype) - shift) / temperature - rest).exp()
        yield part, p * (_matmul(grad, table[part].to(soft.dtype).T) - baseline) / temperature


def soft_embedding_grad_table(
    logits: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """d loss/d table = p^T grad [V, D] of `dtype`."""
    v, d = logits.shape[1], grad.shape[1]
    grad = grad.to(lse.dtype)
    shift, rest = _normaliser(logits.to(lse.dtype), lse, temperature)
    out = torch.empty(v, d, dtype=dtype, device=logits.device)
    for part in _slices(v, max(d, logits.shape[0])):
        p = ((logits[:, part].to(lse.dtype) - shift) / temperature - rest).exp()
        out[part] = _matmul(p.T, grad).to(dtype)
    return out


def entrgi_embedding(
    logits: torch.Tensor,
    table: torch.Tensor,
    draw: Draw,
    tokens: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_mode: str,
    placement: Placement | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole forward: soft + weight (E[token] - soft).

    Args:
        weight_mode: "entropy" (H / log V), "one", "zero" or "given" (reads `weight`). With "zero" nothing is drawn:
            tokens are -1 unless they are given.
        placement: where the rows of the blend are written; None makes a tensor of them.

    Returns:
        (embedding [N, D] of the table's dtype, or the placement's `out`, tokens [N] int64, weight [N] acc, entropy [N]
        acc at temperature 1, soft [N, D] acc, log-sum-exp [N] acc at the draw's temperature, argmax [N] int64).
    """
    acc = accumulation_dtype(logits, table)
    x = logits.to(acc)
    _, _, entropy = _distribution(x, 1.0)
    soft, lse = soft_embedding(logits, table, draw.temperature)
    if weight_mode == "entropy":
        # V = 1: the entropy is 0, so is the weight. Divided all the same: two outputs may not share memory.
        weight = entropy / (math.log(logits.shape[1]) or 1.0)
    elif weight_mode == "given":
        assert weight is not None
        weight = weight.to(acc, copy=True)
    else:
        weight = torch.full_like(entropy, 1.0 if weight_mode == "one" else 0.0)
    if tokens is not None:
        tokens = tokens.clone()
    elif weight_mode == "zero":
        tokens = torch.full_like(draw.keys, -1)
    else:
        tokens = sample_tokens(logits, draw)
    hard = table[tokens.clamp(min=0)].to(acc)
    mixed = torch.lerp(soft, hard, weight[:, None]).to(table.dtype)
    if placement is not None:
        mixed = placement.out.index_copy_(0, placement.rows, mixed)
    return mixed, tokens, weight, entropy, soft, lse, x.argmax(dim=-1)


def guidance_update_(
    logits: torch.Tensor,
    grad: torch.Tensor,
    table: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    adam: Adam,
) -> None:
    """One Adam step on the logits, in place, from `grad` = d loss/d embedding [N, D].

    torch.optim.Adam's arithmetic; see :class:`.arguments.Adam` for when moments are read and written.
    """
    exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, keep = adam
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for part, g in _logit_gradient(logits, table, grad, soft, lse, temperature):
        m, v = (1 - beta1) * g, (1 - beta2) * g * g
        if exp_avg is not None and exp_avg_sq is not None:
            if step > 1:
                m += beta1 * exp_avg[:, part].to(g.dtype)
                v += beta2 * exp_avg_sq[:, part].to(g.dtype)
            if keep:
                exp_avg[:, part] = m.to(exp_avg.dtype)
                exp_avg_sq[:, part] = v.to(exp_avg_sq.dtype)
        update = (lr / correction1) * m / (v.sqrt() / math.sqrt(correction2) + eps)
        logits[:, part] = (logits[:, part].to(g.dtype) - update).to(logits.dtype)


def first_order_update_(
    logits: torch.Tensor, grad: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor, scale: float
) -> None:
    """logits += scale (grad . E - grad . E[token]), in place: a reward's linear part around the tokens [N].

    A row whose token is none (-1, as of a bad row, or V or more) becomes NaN.
    """
    acc = accumulation_dtype(logits, table)
    grad = grad.to(acc)
    legal, none = legal_targets(tokens, table.shape[0])
    baseline = (grad * table[legal].to(acc)).sum(dim=-1).masked_fill_(none, math.nan)[:, None]
    for part in _slices(table.shape[0], max(table.shape[1], logits.shape[0])):
        change = scale * (_matmul(grad, table[part].to(acc).T) - baseline)
        logits[:, part] = (logits[:, part].to(acc) + change).to(logits.dtype)


def unmask_confidence(
    logits: torch.Tensor, tokens: torch.Tensor, alg: str, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Confidence [N] in acc of each row's token; NaN for a bad row.

    `alg`, of the filtered softmax(logits / temperature) unless said otherwise: "entropy" is minus the entropy,
    "maskgit_plus" the token's probability, "topk_margin" the largest probability less the second, "anchor" the token's
    raw logit.
    """
    x = logits.to(accumulation_dtype(logits))
    index = tokens.clamp(min=0)[:, None]
    _, maximum = _shifted(x, 1.0)
    if alg == "anchor":
        confidence = x.gather(-1, index)[:, 0]
    else:
        threshold = filter_threshold(x, temperature, top_k, top_p)
        p, _, entropy = _distribution(x.masked_fill(x < threshold[:, None], -math.inf), temperature)
        if alg == "entropy":
            confidence = -entropy
        elif alg == "maskgit_plus":
            confidence = p.gather(-1, index)[:, 0]
        elif x.shape[1] == 1:
            confidence = p[:, 0]
        else:
            best = p.topk(2, dim=-1).values
            confidence = best[:, 0] - best[:, 1]
    return torch.where(maximum.isnan(), maximum, confidence)


def _head_logits(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Chunks over V of hidden @ head^T + bias: (slice, head's rows [v, D], logits [N, v]), in acc."""
    for part in _slices(head.shape[0], max(head.shape[1], hidden.shape[0])):
        rows = head[part].to(hidden.dtype)
        logits = _matmul(hidden, rows.T)
        yield part, rows, logits if bias is None else logits + bias[part].to(hidden.dtype)


def places(targets: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(bool [N], targets inside the slice; int64 [N], their column in it, some legal column elsewhere)."""
    inside = (targets >= part.start) & (targets < part.stop)
    return inside, (targets - part.start).clamp(0, part.stop - part.start - 1)


def legal_targets(targets: torch.Tensor, v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [N], targets with some token of the V in place of what is none; bool [N], which are none)."""
    legal = targets.clamp(0, v - 1)
    return legal, legal != targets


def token_log_prob(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, slope: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log softmax(hidden @ head^T + bias) at the targets [N], log-sum-exp [N], slope [N, D]), all acc.

    The slope is d log-probability / d hidden = head[target] - softmax @ head, formed in the same walk over the
    vocabulary (its sums rescaled as the maximum grows); [0, D] unless asked for. A target outside [0, V) gives NaN,
    and slope 0.
    """
    x = hidden.to(accumulation_dtype(hidden, head))
    n, d = x.shape
    maximum, total = x.new_full((n,), -math.inf), x.new_zeros(n)
    picked, mean = x.new_full((n,), math.nan), x.new_zeros(n if slope else 0, d)
    for part, rows, logits in _head_logits(x, head, bias):
        largest = torch.maximum(maximum, logits.amax(dim=-1))
        shift = torch.where(largest == -math.inf, torch.zeros_like(largest), largest)
        rescale, weights = (maximum - shift).exp(), (logits - shift[:, None]).exp()
        total = total * rescale + weights.sum(dim=-1)
        if slope:
            mean = mean.mul_(rescale[:, None]).add_(_matmul(weights, rows))
        inside, column = places(targets, part)
        picked = torch.where(inside, logits.gather(-1, column[:, None])[:, 0], picked)
        maximum = largest
    lse = maximum + total.log()
    if slope:
        legal, ignored = legal_targets(targets, head.shape[0])
        mean = (head[legal].to(x.dtype) - mean / total[:, None]).masked_fill_(ignored[:, None], 0)
    return (picked - maximum) - total.log(), lse, mean


def token_log_prob_backward(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden [N, D], head [V, D] and bias [V] ([0] without one), each of its tensor's dtype.

    With y the one-hot targets and g = `grad` [N]:  d logits = g (y - p),  d hidden = d logits @ head,
    d head = d logits^T @ hidden,  d bias = the sum of d logits over rows.
    """
    x, g = hidden.to(lse.dtype), grad.to(lse.dtype)[:, None]
    grad_hidden = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_head = torch.empty(head.shape, dtype=head.dtype, device=head.device)
    grad_bias = (
        grad_head.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    )
    for part, rows, logits in _head_logits(x, head, bias):
        change = -g * (logits - lse[:, None]).exp()
        inside, column = places(targets, part)
        change.scatter_add_(1, column[:, None], torch.where(inside[:, None], g, torch.zeros_like(g)))
        grad_hidden += _matmul(change, rows)
        grad_head[part] = _matmul(change.T, x).to(head.dtype)
        if bias is not None:
            grad_bias[part] = change.sum(dim=0).to(bias.dtype)
    return grad_hidden.to(hidden.dtype), grad_head, grad_bias
