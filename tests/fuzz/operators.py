"""Every public operator, forward and gradient, on every backend of this process against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from entrgi_kernels import ops
from entrgi_kernels.guidance import LogitOptimizer
from entrgi_kernels.names import SCORED_ALGS

from .case import LEAST, TRITON, Case
from .case import prepare as prepare
from .draws import DTYPES, Draws, Failure, same_bits, tensors_of
from .truth import EPS, Race, Rows, acc_of, all_nan, array, kept, near


def _gradients(outputs: Any, inputs: list[torch.Tensor], grads: Any) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, grads)


def _output_grad(c: Case, n: int, d: int, dtype: torch.dtype, name: str = "grad") -> torch.Tensor:
    scale = c.d.pick([1.0, 1.0, 1e-3, 30.0])
    return c.d.laid(torch.from_numpy(c.d.normal(n, d) * scale).to(dtype), name)


def _tame(facts: Rows) -> np.ndarray:
    """Good rows whose gradient means something in acc: log-sum-exp and logits fit, and keep digits after the point."""
    return ~facts.overflows & (facts.drift[:, 0] < 0.5)


def softmax_entropy(c: Case) -> None:
    (n, v), (dtype, _) = c.shape(), c.dtypes()
    x, tau = c.d.laid(c.d.logits(n, v, dtype), "logits"), c.d.temperature()
    acc, gradient = acc_of(x), c.d.chance(0.7)
    facts = Rows(x, tau, acc)
    weights = torch.from_numpy(c.d.normal(2, n)).to(acc)

    def call(backend: str) -> Any:
        leaf = x.requires_grad_(gradient)
        lse, entropy = ops.softmax_entropy(leaf, tau, backend=backend)
        if not gradient:
            return lse, entropy
        return lse, entropy, *_gradients([lse, entropy], [leaf], list(weights))

    for out in c.each(call):
        near("logsumexp", out[0], facts.lse, facts.lse_bound, acc, facts.good)
        near("entropy", out[1], facts.entropy, facts.entropy_bound, acc, facts.good)
        all_nan("logsumexp", out[0], ~facts.good)
        all_nan("entropy", out[1], ~facts.good)
        if out[0].dtype != acc or out[1].dtype != acc:
            raise Failure(f"statistics are {out[0].dtype}")
        if gradient:
            g, h = (array(w)[facts.good][:, None] for w in weights)
            with np.errstate(all="ignore"):
                logs = np.where(facts.p > 0, facts.shift - facts.shift.max(axis=1, keepdims=True), 0)
                logs = np.where(facts.p > 0, logs - np.log(np.exp(facts.shift).sum(axis=1, keepdims=True)), 0)
                surprise = logs + facts.entropy[:, None]
                truth = facts.p * (g - h * surprise) / facts.tau
                size = facts.p * (np.abs(g) + np.abs(h) * (np.abs(logs) + facts.entropy[:, None] + 1)) / facts.tau
                error = (np.expm1(np.log1p(facts.drift)) * 2 + facts.relative + 4 * facts.entropy_bound) * size
                tiny = 32 * torch.finfo(acc).tiny * (np.abs(g) + 800 * np.abs(h)) * (1 + 1 / facts.tau)
            check_rows("grad of logits", out[2], truth, error + tiny, x, facts)


def check_rows(
    name: str, ours: torch.Tensor, truth: np.ndarray, bound: np.ndarray, logits: torch.Tensor, facts: Rows
) -> None:
    """A gradient of the logits: near the truth in tame good rows, 0 at -inf, no NaN where log-sum-exp fits."""
    ours64, tame = array(ours)[facts.good], _tame(facts)
    near(name, ours64[tame], truth[tame], bound[tame], ours.dtype)
    fits = ~facts.overflows
    if np.isnan(ours64[fits]).any():
        raise Failure(f"{name} is NaN in a good row")
    if (ours64[fits][facts.x[fits] == -np.inf] != 0).any():
        raise Failure(f"{name} is not 0 where the logit is -inf")


class Products:
    """Truth and bounds of the soft embedding [g, d] and of its gradients."""

    def __init__(self, x: torch.Tensor, e: torch.Tensor, tau: float) -> None:
        self.acc = acc_of(x, e)
        self.facts = facts = Rows(x, tau, self.acc)
        self.e = array(e)
        self.sizes = np.abs(self.e)
        # Tiles round p: to bfloat16 under 16-bit logits and a bfloat16 table (docs/native.md), Triton's to operands'.
        half = TRITON and e.dtype == torch.float16
        self.rounded = 2.0**-11 if half else 2.0**-8 if e.dtype == torch.bfloat16 and x.element_size() == 2 else 0.0
        self.soft = facts.p @ self.e
        self.mass = facts.p @ self.sizes
        tiny = (LEAST if half else torch.finfo(self.acc).tiny * 32) * self.sizes.sum(axis=0)
        self.soft_bound = (facts.p * facts.relative) @ self.sizes + (facts.rounding + self.rounded) * self.mass + tiny

    def logit_gradient(self, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(d loss/d logits [g, v], its bound) for d loss/d embedding [g, d]."""
        facts, size = self.facts, np.abs(grad)
        eps = facts.eps * (16 + np.sqrt(grad.shape[1]))
        pull = grad @ self.e.T - (grad * self.soft).sum(axis=1, keepdims=True)
        terms = size @ self.sizes.T + (size * self.mass).sum(axis=1, keepdims=True)
        with np.errstate(all="ignore"):
            truth = facts.p * pull / facts.tau
            error = facts.p * (2 * facts.drift * np.abs(pull) + (1 + facts.drift) * eps * terms)
            error += facts.p * (1 + facts.drift) * (size * self.soft_bound).sum(axis=1, keepdims=True)
            return truth, (error + torch.finfo(self.acc).tiny * 32 * (1 + terms)) / facts.tau


def soft_embedding(c: Case) -> None:
    (n, v), (dtype, table_dtype), d = c.shape(), c.dtypes(), c.width()
    x, e = c.d.laid(c.d.logits(n, v, dtype), "logits"), c.d.laid(c.d.table(v, d, table_dtype), "table")
    tau, grad = c.d.temperature(), _output_grad(c, n, d, table_dtype)
    products = Products(x, e, tau)
    facts = products.facts
    learns = c.d.pick(["none", "logits", "both", "both"])

    def call(backend: str) -> Any:
        logits, table = x.requires_grad_(learns != "none"), e.requires_grad_(learns == "both")
        out = ops.soft_embedding(logits, table, temperature=tau, backend=backend)
        leaves = [t for t in (logits, table) if t.requires_grad]
        return (out, *_gradients(out, leaves, grad)) if leaves else (out,)

    for out in c.each(call):
        near("soft embedding", out[0], products.soft, products.soft_bound, table_dtype, facts.good)
        all_nan("soft embedding", out[0], ~facts.good)
        if learns != "none":
            g = array(grad)[facts.good]
            check_rows("grad of logits", out[1], *products.logit_gradient(g), x, facts)
            if learns == "both" and facts.good.all() and _tame(facts).all():
                pulled = np.abs(facts.p).T @ np.abs(g)
                bound = (facts.p * (2 * facts.drift + facts.relative + facts.eps * (8 + np.sqrt(n)))).T @ np.abs(g)
                bound += products.rounded * pulled + (torch.finfo(products.acc).tiny * 32 + LEAST) * np.abs(g).sum()
                near("grad of table", out[2], facts.p.T @ g, bound, table_dtype)


def _draw(c: Case, n: int, v: int) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """(arguments of a draw, keys [n], rng [2])."""
    chosen = c.d.filters(v) | c.d.keyed(n)
    keys = chosen.get("keys", torch.arange(n))
    seed = chosen["seed"]
    rng = seed if isinstance(seed, torch.Tensor) else torch.tensor([seed, chosen["counter"]])
    return chosen, keys, rng


def _check_tokens(tokens: torch.Tensor, facts: Rows, tau: float, race: Callable[[], Race]) -> None:
    if tau:
        race().check(tokens)
        return
    if (tokens.numpy()[~facts.good] != -1).any():
        raise Failure("the token of a bad row is not -1")
    if (tokens.numpy()[facts.good] != facts.x.argmax(axis=1)).any():
        raise Failure("the token at temperature 0 is not the first of the largest")


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []
    return lambda: made[0] if made else made.append(make()) or made[0]


def sample_tokens(c: Case) -> None:
    (n, v), (dtype, _) = c.shape(), c.dtypes()
    x, tau = c.d.laid(c.d.logits(n, v, dtype), "logits"), c.d.temperature()
    chosen, keys, rng = _draw(c, n, v)
    facts = Rows(x, tau, acc_of(x))
    race = _once(lambda: Race(facts, keys, rng, chosen.get("top_k"), chosen.get("top_p")))

    def call(backend: str) -> Any:
        return ops.sample_tokens(x, temperature=tau, backend=backend, **chosen)

    for tokens in c.each(call):
        _check_tokens(tokens, facts, tau, race)


def entrgi_embedding(c: Case) -> None:
    (n, v), (dtype, table_dtype), d = c.shape(), c.dtypes(), c.width()
    x, e = c.d.laid(c.d.logits(n, v, dtype), "logits"), c.d.laid(c.d.table(v, d, table_dtype), "table")
    tau, grad = c.d.temperature(), _output_grad(c, n, d, table_dtype)
    products = Products(x, e, tau)
    facts, acc = products.facts, products.acc
    unit = Rows(x, 1.0, acc)
    chosen, keys, rng = _draw(c, n, v)
    mode = c.d.pick(["entropy", "entropy", "one", "zero", "given", "call"])
    c.d.note(weight=mode)
    weight: Any = mode
    if mode == "given":
        some = torch.from_numpy(c.d.pick([c.d.normal(n), np.zeros(n), np.ones(n), np.linspace(-0.5, 1.5, n)]))
        weight = c.d.laid(some.to(c.d.pick(DTYPES)), "weight")
    elif mode == "call":
        weight = lambda entropy, size: entropy / (1 + size)  # noqa: E731
    given = c.d.laid(c.d.integers(0, v - 1, n), "tokens") if c.d.chance(0.3) else None
    # Without a gradient, rows may go to places in something wider.
    placed = c.d.chance(0.4)
    gradient = not placed and c.d.chance(0.7)
    rows = n + c.d.integer(0, 4)
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))[:n]
    race = _once(lambda: Race(facts, keys, rng, chosen.get("top_k"), chosen.get("top_p")))
    outs = {}
    if placed:
        for engine in c.engines:
            outs[engine] = c.d.laid(torch.zeros(rows, d, dtype=table_dtype), "out", dense=True, written=True)

    def call(backend: str) -> Any:
        logits = x.detach().requires_grad_(gradient)
        where = {"out": outs[c.engine].zero_(), "index": index} if placed else {}
        out = ops.entrgi_embedding(
            logits, e, temperature=tau, weight=weight, tokens=given, backend=backend, **chosen, **where
        )
        gradients = _gradients(out.embedding, [logits], grad) if gradient else ()
        return out, *gradients

    for out, *gradients in c.each(call):
        good, tokens = facts.good, out.tokens
        if given is not None:
            if not torch.equal(tokens, given):
                raise Failure("tokens are not those given")
        elif mode == "zero":
            if (tokens != -1).any():
                raise Failure("weight zero drew a token")
        else:
            _check_tokens(tokens, facts, tau, race)
        near("entropy", out.entropy, unit.entropy, unit.entropy_bound, acc, good)
        all_nan("entropy", out.entropy, ~good)
        share, share_bound = _share(mode, weight, unit, Rows(x, 1.0, acc_of(x)).entropy_bound, v)
        near("weight", out.weight, share, share_bound, acc, None if mode in ("one", "zero", "given") else good)
        if mode in ("one", "zero", "given"):
            share = share[good]
        near("soft", out.state.soft, products.soft, products.soft_bound, acc, good)
        near("logsumexp", out.state.logsumexp, facts.lse, facts.lse_bound, acc, good)
        if (out.state.argmax.numpy()[good] != facts.x.argmax(axis=1)).any():
            raise Failure("state.argmax is not the first of the largest")
        blend = out.embedding[index] if placed else out.embedding
        hard = products.e[np.maximum(tokens.numpy()[good], 0)]
        w, wb = share[:, None], np.broadcast_to(share_bound, share.shape)[:, None]
        truth = products.soft + w * (hard - products.soft)
        bound = (np.abs(1 - w) + wb) * products.soft_bound + wb * np.abs(hard - products.soft)
        bound += 4 * facts.eps * (1 + np.abs(w)) * (np.abs(hard) + np.abs(products.soft))
        near("embedding", blend, truth, bound, table_dtype, good)
        all_nan("embedding", blend, ~good)
        if placed and len(untouched := np.setdiff1d(np.arange(rows), index.numpy())):
            if (array(out.embedding)[untouched] != 0).any():
                raise Failure("a row of out that no index names was written")
        if gradients:
            check_rows("grad of logits", gradients[0], *products.logit_gradient(array(grad)[good]), x, facts)


def _share(mode: str, weight: Any, unit: Rows, own: float, v: int) -> tuple[np.ndarray, np.ndarray | float]:
    """(the hard token's share, its bound): of the good rows, or of all where it does not depend on the logits."""
    if mode == "entropy":
        scale = np.log(v) or 1.0
        return unit.entropy / scale, unit.entropy_bound / scale
    if mode == "call":
        return unit.entropy / (1 + v), own  # what a callable is given was found in the logits' own precision
    if mode == "given":
        return array(weight), 2.0**-24
    return np.full(len(unit.good), float(mode == "one")), 0.0


def guidance_update_(c: Case) -> None:
    (n, v), (dtype, table_dtype), d = c.shape(), c.dtypes(), c.width()
    values = c.d.logits(n, v, dtype)
    e = c.d.laid(c.d.table(v, d, table_dtype), "table")
    tau = c.d.temperature()
    acc = acc_of(values, e)
    grad = _output_grad(c, n, d, c.d.pick([table_dtype, torch.float32]))
    step, keep = c.d.pick([0, 0, 1, 2, 1000]), c.d.chance(0.8)
    lr = c.d.pick([0.5, 0.01, 0.0, 10.0])
    betas, eps = c.d.pick([(0.9, 0.999), (0.0, 0.0), (0.5, 0.99)]), c.d.pick([1e-8, 1e-8, 1e-3, 1.0])
    state_dtype = c.d.pick([None, acc if dtype == torch.float16 else dtype, acc, torch.float32])
    c.d.note(step=step, lr=lr, betas=betas, eps=eps, moments=state_dtype)
    moments = None
    if state_dtype is not None:
        first = torch.from_numpy(c.d.normal(n, v) * 0.1).to(state_dtype)
        moments = first, (first.double() ** 2 * c.d.uniform(0.5, 2)).to(state_dtype)
        if step == 0 and c.d.chance(0.5):  # a first step reads none of it
            moments = tuple(torch.full_like(m, torch.nan) for m in moments)
    products = Products(values, e, tau)
    facts = products.facts
    tame = _tame(facts)
    pull, pull_bound = products.logit_gradient(array(grad)[facts.good])
    low, high = _adam_range(pull, pull_bound, moments, step, lr, betas, eps, facts, acc)
    memory = {
        engine: [
            c.d.laid(t, name, written=True)
            for t, name in zip([values, *(moments or ())], ["logits", "exp_avg", "exp_avg_sq"], strict=False)
        ]
        for engine in c.engines
    }

    def call(backend: str) -> Any:
        phi, *kept_moments = memory[c.engine]
        for tensor, content in zip([phi, *kept_moments], [values, *(moments or ())], strict=True):
            tensor.copy_(content)
        adam = ops.AdamState(*kept_moments, step) if moments else None
        state = ops.entrgi_embedding(phi, e, temperature=tau, weight="zero", backend=backend).state
        ops.guidance_update_(phi, grad, e, state, lr=lr, adam=adam, betas=betas, eps=eps, keep=keep, backend=backend)
        if adam is not None and adam.step != step + keep:
            raise Failure(f"adam.step is {adam.step}")
        return tuple(t.clone() for t in (phi, *kept_moments))

    for out in c.each(call):
        moved = array(out[0])[facts.good]
        with np.errstate(all="ignore"):
            middle, width = facts.x - (low + high) / 2, np.abs(high - low) / 2
            width = (
                width + 2 * (4 * facts.eps + EPS[dtype]) * (np.abs(facts.x) + np.abs(high) + np.abs(low)) + lr * 1e-30
            )
        middle, width = (np.where(facts.x == -np.inf, part, t) for part, t in ((-np.inf, middle), (0.0, width)))
        near("phi", moved[tame], middle[tame], width[tame], dtype)
        if np.isnan(moved[~facts.overflows]).any():
            raise Failure("phi is NaN in a good row")
        if moments and not keep:
            if not (same_bits(out[1], moments[0]) and same_bits(out[2], moments[1])):
                raise Failure("moments changed with keep=False")
        elif moments:
            b1, b2 = betas
            old = [array(m)[facts.good] if step else np.zeros_like(pull) for m in moments]
            truth = b1 * old[0] + (1 - b1) * pull
            bound = 2 * (1 - b1) * pull_bound + 8 * facts.eps * (np.abs(old[0]) + np.abs(pull))
            near("exp_avg", array(out[1])[facts.good][tame], truth[tame], bound[tame], state_dtype)
            truth = b2 * old[1] + (1 - b2) * pull**2
            with np.errstate(all="ignore"):
                bound = (1 - b2) * (2 * np.abs(pull) + pull_bound) * pull_bound + 8 * facts.eps * (old[1] + pull**2)
            near("exp_avg_sq", array(out[2])[facts.good][tame], truth[tame], bound[tame], state_dtype)


def _adam_range(pull, pull_bound, moments, step, lr, betas, eps, facts, acc) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest step of Adam whose gradient lies within its bound."""
    b1, b2 = betas
    m0, v0 = (array(m)[facts.good] if moments and step else np.zeros_like(pull) for m in (moments or (None, None)))
    number = step + 1 if moments else 1
    correction, root = 1 - b1**number, np.sqrt(1 - b2**number)
    with np.errstate(all="ignore"):
        ends = pull - pull_bound, pull + pull_bound
        sizes = np.maximum(np.abs(ends[0]), np.abs(ends[1]))
        least = np.where(ends[0] * ends[1] <= 0, 0.0, np.minimum(np.abs(ends[0]), np.abs(ends[1])))
        # Squares below the smallest number of acc are zeros.
        least = np.where(least**2 * (1 - b2) < torch.finfo(acc).tiny * 4, 0.0, least)
        small, large = (np.sqrt(b2 * v0 + (1 - b2) * g**2) / root + eps for g in (least, sizes))
        steps = []
        for end in ends:
            m = (b1 * m0 + (1 - b1) * end) * lr / correction
            steps += [m / small, m / large]
        if not (moments and step):  # m and v of one gradient: the ratio grows with it, wherever it lies
            steps = [lr * end / (np.abs(end) + eps) for end in ends]
            tiny = np.abs(pull) ** 2 * (1 - b2) < torch.finfo(acc).tiny * 4
            steps += [np.where(tiny, lr * end / eps, steps[0]) for end in ends]
        return np.minimum.reduce(steps), np.maximum.reduce(steps)


def first_order_update_(c: Case) -> None:
    (n, v), (dtype, table_dtype), d = c.shape(), c.dtypes(), c.width()
    values, e = c.d.logits(n, v, dtype), c.d.laid(c.d.table(v, d, table_dtype), "table")
    grad, tokens = _output_grad(c, n, d, c.d.pick([table_dtype, torch.float32])), c.d.integers(0, v - 1, n)
    lost = np.array([c.d.chance(0.1) for _ in range(n)], dtype=bool)
    tokens[torch.from_numpy(lost)] = c.d.pick([-1, v])
    scale = c.d.pick([1.0, 0.01, 0.0, -3.0])
    c.d.note(scale=scale)
    acc = acc_of(values, e)
    x, table, g = array(values), array(e), array(grad)
    hard, size = table[tokens.clamp(0, v - 1).numpy()], np.abs(g)
    with np.errstate(all="ignore"):
        truth = x + scale * (g @ table.T - (g * hard).sum(axis=1, keepdims=True))
        terms = size @ np.abs(table).T + (size * np.abs(hard)).sum(axis=1, keepdims=True)
        eps = torch.finfo(acc).eps
        bound = eps * abs(scale) * (16 + np.sqrt(d)) * terms + 4 * eps * np.abs(x)
        bound += (torch.finfo(acc).tiny * 32 + LEAST) * (1 + abs(scale) * (1 + terms))
    memory = {engine: c.d.laid(values, "logits", written=True) for engine in c.engines}

    def call(backend: str) -> Any:
        phi = memory[c.engine]
        phi.copy_(values)
        ops.first_order_update_(phi, grad, e, tokens, scale=scale, backend=backend)
        return (phi.clone(),)

    plain = np.isfinite(x)
    for out in c.each(call):
        all_nan("phi of a row without a token", out[0], lost)
        moved = array(out[0])
        if (np.isnan(moved) != (np.isnan(x) | lost[:, None])).any():
            raise Failure("NaN where there was none, or the reverse")
        held = ~plain & ~np.isnan(x) & ~lost[:, None]
        if (moved[held] != x[held]).any():
            raise Failure("an infinite logit moved")
        kept_rows = plain & ~lost[:, None]
        # A wider bound where the dtype's range ends.
        near("phi", *(np.where(kept_rows, t, 0.0) for t in (moved, truth, bound)), dtype)


def unmask_confidence(c: Case) -> None:
    (n, v), (dtype, _) = c.shape(), c.dtypes()
    x, tau = c.d.laid(c.d.logits(n, v, dtype), "logits"), c.d.temperature()
    tokens, alg, chosen = c.d.laid(c.d.integers(0, v - 1, n), "tokens"), c.d.pick(SCORED_ALGS), c.d.filters(v)
    c.d.note(alg=alg)
    facts = Rows(x, tau, acc_of(x))
    own = np.arange(len(facts.x)), tokens.numpy()[facts.good]
    if alg == "anchor":
        clear, truth, bound = np.ones(len(facts.x), bool), facts.x[own], 0.0
    else:
        sure, maybe = kept(facts, chosen.get("top_k"), chosen.get("top_p"))
        clear = (sure == maybe).all(axis=1)
        p = np.where(sure, facts.p, 0)
        p /= p.sum(axis=1, keepdims=True) + 1e-300
        bound = facts.rounding * 4 + facts.eps * 32
        if alg == "entropy":
            truth = (p * np.log(np.where(p > 0, p, 1))).sum(axis=1)
            bound = facts.entropy_bound
        elif alg == "maskgit_plus":
            truth = p[own]
        else:
            ranked = np.sort(np.pad(p, ((0, 0), (0, 1))), axis=1)
            truth = ranked[:, -1] - ranked[:, -2]
    bound = np.broadcast_to(bound, truth.shape)

    def call(backend: str) -> Any:
        return ops.unmask_confidence(x, tokens, alg=alg, temperature=tau, backend=backend, **chosen)

    for out in c.each(call):
        near("confidence", array(out)[facts.good][clear], truth[clear], bound[clear], out.dtype)
        all_nan("confidence", out, ~facts.good)


def token_log_prob(c: Case) -> None:
    (n, v), (dtype, table_dtype), d = c.shape(), c.dtypes(), c.width()
    if c.d.chance(0.2):
        n, v = v, min(n + 1, 40)
        n = min(n, 200)
    scale = c.d.pick([1.0, 1.0, 0.1, 20.0]) / np.sqrt(d)
    h = c.d.laid(torch.from_numpy(c.d.normal(n, d) * scale).to(dtype), "hidden")
    w = c.d.laid(torch.from_numpy(c.d.normal(v, d)).to(table_dtype), "head")
    bias = None
    if c.d.chance(0.4):
        b = c.d.normal(v)
        if v > 1 and c.d.chance(0.3):
            b[c.d.integer(0, v - 1)] = -np.inf
        bias = c.d.laid(torch.from_numpy(b).to(c.d.pick([table_dtype, torch.float32])), "bias")
    targets = c.d.integers(0, v - 1, n)
    outside = torch.zeros(n, dtype=torch.bool)
    if n and c.d.chance(0.3):
        outside = c.d.integers(0, 2, n) == 0
        targets[outside] = c.d.pick([-100, -1, v, 1 << 40])
    targets = c.d.laid(targets, "targets")
    acc, made = acc_of(h, w), torch.promote_types(dtype, table_dtype)
    learns = c.d.pick([(), (0,), (0, 1), (1,), (0, 1, 2)])
    g = torch.where(outside, 0.0, torch.from_numpy(c.d.normal(n))).to(acc)
    c.d.note(n=n, v=v, d=d, bias=None if bias is None else bias.dtype, outside=bool(outside.any()), learns=learns)

    h64, w64 = array(h), array(w)
    z, size = h64 @ w64.T, np.abs(h64) @ np.abs(w64).T
    if bias is not None:
        z, size = z + array(bias), size + np.where(np.isfinite(array(bias)), np.abs(array(bias)), 0)
    facts = Rows(torch.from_numpy(z), 1.0, acc)
    # Logits come rounded to the products' dtype where the library has no wider ones, once for the bias too.
    error = 2 * EPS[made] * np.where(np.isfinite(z), np.abs(z), 0) + EPS[acc] * (8 + np.sqrt(d)) * size
    error = (error + (2 * EPS[made] * size if bias is not None else 0)).max(axis=1, initial=0)[:, None]
    legal = np.clip(targets.numpy(), 0, v - 1)
    ok = ~outside.numpy() & facts.good if n else np.zeros(0, bool)
    ok[ok] &= z[ok, legal[ok]] > -np.inf
    fits = size.max(initial=0) < torch.finfo(made).max / 4

    def call(backend: str) -> Any:
        leaves = [h.detach(), w.detach(), None if bias is None else bias.detach()]
        for place in learns:
            if leaves[place] is not None:
                leaves[place].requires_grad_()
        out = ops.token_log_prob(*leaves[:2], targets, bias=leaves[2], backend=backend)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        loss = torch.where(outside, 0.0, out) if wanted else None
        return out, (_gradients(loss, wanted, g) if wanted else ())

    full = facts.good.all() and n > 0
    truth = facts.shift[np.arange(n), legal] - np.log(np.exp(facts.shift).sum(axis=1)) if full else None
    for out, gradients in c.each(call):
        if not fits:
            continue
        all_nan("log-probability of a target outside", out, outside.numpy())
        if not full:
            continue
        bound = 2 * error[:, 0] + facts.lse_bound + facts.rounding
        near("log-probability", array(out)[ok], truth[ok], bound[ok], acc)
        kinds = [place for place in (0, 1, 2) if place in learns and (place < 2 or bias is not None)]
        change = -array(g)[:, None] * facts.p
        change[np.arange(n), legal] += array(g)
        if not ok.all() and not (outside.numpy() | ok).all():
            continue
        blur = facts.p * (np.expm1(np.minimum(2 * error, 50)) + facts.relative + facts.drift)
        blur[np.arange(n), legal] += blur.sum(axis=1)
        blur = np.abs(array(g))[:, None] * (blur + 2.0**-7 * facts.p * (made.itemsize == 2))
        widths = np.abs(array(g))[:, None] * facts.p
        widths[np.arange(n), legal] += np.abs(array(g))
        noise = facts.eps * (16 + np.sqrt(max(n, v)))
        # The target's part and the rest's are rounded to the products' dtype before they are added.
        noise += 2 * EPS[made]
        for place, ours in zip(kinds, gradients, strict=True):
            if place == 0:
                exact, allowed, most = change @ w64, (blur + noise * widths) @ np.abs(w64), np.abs(w64).sum()
            elif place == 1:
                exact, allowed, most = change.T @ h64, (blur + noise * widths).T @ np.abs(h64), np.abs(h64).sum()
            else:
                exact, allowed, most = change.sum(axis=0), (blur + noise * widths).sum(axis=0), n
            name = ("grad of hidden", "grad of head", "grad of bias")[place]
            # A probability times a gradient that is rounded to float16 may be none at all there.
            least = max(torch.finfo(acc).tiny * 8, torch.finfo(made).tiny * EPS[made] * 2 * (place > 0))
            near(name, ours, exact, allowed + least * (1 + most), ours.dtype)


def logit_optimizer(c: Case) -> None:
    """Its steps are those of the operators by hand, bit for bit, whatever of it is used."""
    (n, v), (dtype, table_dtype), d = c.shape(), c.dtypes(), c.width()
    n, v = min(n, 5), min(v, 300)
    x, e = c.d.logits(n, v, dtype), c.d.laid(c.d.table(v, d, table_dtype), "table")
    tau = c.d.pick([0.0, 1.0, c.d.uniform(0.1, 2.0)])
    settings = c.d.filters(v)
    weight = c.d.pick(["entropy", "one", "zero"])
    update = {"lr": c.d.uniform(0, 1), "betas": (0.9, 0.99), "eps": 1e-6}
    moments, length = c.d.pick([None, torch.float32, torch.float64]), c.d.integer(1, 2)
    grads = [_output_grad(c, n, d, table_dtype, f"grad {i}") for i in range(length)]
    last = c.d.chance(0.5)
    rows = torch.arange(n)[:: c.d.integer(1, 3)]
    c.d.note(temperature=tau, weight=weight, steps=length, moments=moments)

    def call(backend: str) -> Any:
        ours, phi = x.clone(), x.clone()
        optimizer = LogitOptimizer(
            ours, e, temperature=tau, weight=weight, seed=3, counter=7, state_dtype=moments, backend=backend,
            **update, **settings,
        )  # fmt: skip
        adam = ops.AdamState.zeros(phi, moments)
        for number, grad in enumerate(grads):
            blend = optimizer.embed()
            hand = ops.entrgi_embedding(
                phi, e, temperature=tau, weight=weight, seed=3, counter=7 + number, backend=backend, **settings
            )
            for one, two in zip(tensors_of(tuple(blend)), tensors_of(tuple(hand)), strict=True):
                if not same_bits(one, two):
                    raise Failure("embed() is not entrgi_embedding of the same logits")
            end = last and number == length - 1
            if end:
                some, moved = phi[rows], optimizer.moved_rows(grad, rows)
                own = ops.AdamState(adam.exp_avg[rows], adam.exp_avg_sq[rows], adam.step)
                ops.guidance_update_(some, grad[rows], e, hand.state.rows(rows), adam=own, backend=backend, **update)
                if not same_bits(some, moved):
                    raise Failure("moved_rows() is not guidance_update_ of those rows")
            optimizer.step(grad, last=end)
            ops.guidance_update_(phi, grad, e, hand.state, adam=adam, keep=not end, backend=backend, **update)
            if not same_bits(ours, phi):
                raise Failure("step() is not guidance_update_ of the same logits")
        return ours

    for _ in c.each(call):
        pass


# Twice as often as the optimiser, which is made of them.
OPERATORS = 2 * (
    softmax_entropy, soft_embedding, sample_tokens, entrgi_embedding, guidance_update_, first_order_update_,
    unmask_confidence, token_log_prob,
) + (logit_optimizer,)  # fmt: skip


def run(draws: Draws) -> dict[str, int]:
    """One case; returns how many calls each (operator, backend) had, raises Failure."""
    function = draws.pick(OPERATORS)
    case = Case(draws, function.__name__)
    try:
        function(case)
    except Failure as failure:
        raise Failure(f"{function.__name__} on {case.engine}: {failure}") from None
    except Exception as error:
        raise Failure(f"{function.__name__} on {case.engine}: {type(error).__name__}: {error}") from error
    return {f"{function.__name__} {engine}": count for engine, count in case.counts.items()}
