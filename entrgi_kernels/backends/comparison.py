"""GPU kernels against eager arithmetic, at small problems of one :class:`.trials.Trial`, on the machine at hand.

* Products and updates on powers of two and small integers, whose sums are exact in float32: 16-bit operands exactly.
* Statistics, draws and confidences also on random rows, within the rounding of float32, with bad rows among them.
* Every launch of :data:`LAUNCHES` with the others, bit by bit: a race shows now and then, not always.

Rows lie in memory full of NaN, and so do results that nobody has written. The truth is the eager backend in float64,
but for draws: those are compared token by token in float32, and one tie within rounding is let pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from . import eager
from .arguments import Adam, Draw, Placement
from .trials import Form, Trial, architecture, limit, low

LAUNCHES = 50
_LN2 = math.log(2.0)
_ADAM = dict(lr=8.0, beta1=0.9, beta2=0.999, eps=0.02)  # eps near the gradients: their size shows in the step

_SCALE = 0.25  # a power of two: what a row's products come to stays exact


class Finding(NamedTuple):
    """One comparison: `excess` is the worst error over its bound (passed up to 1), `error` the largest one itself."""

    name: str
    excess: float
    error: float


_LONG = ("softmax_entropy", "sample_tokens", "soft_embedding", "entrgi_embedding", "unmask_confidence")


class Scale(NamedTuple):
    """Sizes of a trial: V and D at the least, V where rows are split, and how many rows there are beyond the
    fewest that reach the entry."""

    v: int
    d: int
    split: int
    more: int


GPU = Scale(v=4096, d=512, split=36_864, more=36)


def scale_of(device: torch.device) -> Scale:
    """The sizes that trials on a device are compared at."""
    chosen = architecture(device)
    if chosen is not None and chosen.name == "interpreter":
        return Scale(v=128, d=32, split=270, more=4)
    return Scale(v=4096, d=256, split=8192, more=36) if device.type == "cpu" else GPU


class _Maker:
    """Tensors of one trial."""

    def __init__(self, trial: Trial, device: torch.device) -> None:
        self.trial, self.device = trial, device
        scale = scale_of(device)
        first, last = trial.rows
        self.n = first + scale.more if last is None else min(last, first + scale.more)
        # Long rows, which are split over programs, where the results are no wider than D and rows are few.
        base = scale.split if trial.op in _LONG and self.n < 128 else scale.v
        self.v, self.d = (
            1 if low == 0 else least + (5 * low if low < limit(device) else 0)
            for low, least in ((trial.v, base), (trial.d, scale.d))
        )
        self.generator = torch.Generator(device).manual_seed(20_260)

    def form(self, place: int) -> Form:
        form = self.trial.forms[place]
        assert form is not None
        return form

    def placed(self, values: torch.Tensor, form: Form) -> torch.Tensor:
        """A copy of `values` [N, X] of this form, NaN between its rows."""
        n, columns = values.shape
        if not form.apart:
            return self.placed(values[:1], form._replace(apart=True)).expand(n, columns)
        stride = columns
        while low(stride, 16) != form.low:
            stride += 1
        start = 0 if form.aligned else 1
        memory = torch.full((n * stride + start,), math.nan, dtype=form.dtype, device=self.device)
        return memory.as_strided((n, columns), (stride, 1), start).copy_(values)

    def integers(self, rows: int, columns: int, most: int, form: Form | None = None) -> torch.Tensor:
        """Integers from -most to most."""
        size = (rows, columns)
        values = torch.randint(-most, most + 1, size, generator=self.generator, device=self.device, dtype=torch.int8)
        return values.float() if form is None else self.placed(values, form)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, device=self.device, dtype=torch.float32)

    def powers(self, flat: bool = False) -> torch.Tensor:
        """Logits 0 to 3 and -inf, so placed that softmax(x ln 2) is a power of two everywhere; 0 and -inf if `flat`."""
        unit = 1 << (self.v // 15).bit_length() - 1 if self.v >= 15 else 0
        levels = torch.full((self.v,), -math.inf if unit else 0.0, device=self.device)
        if flat:
            levels[: 8 * unit] = 0.0
        else:
            levels[: 15 * unit] = torch.repeat_interleave(
                torch.arange(4.0, device=self.device), torch.tensor([8, 4, 2, 1], device=self.device) * unit
            )
        order = torch.rand((self.n, self.v), generator=self.generator, device=self.device).argsort(dim=1)
        return self.placed(levels[order], self.form(0))

    def rows(self) -> torch.Tensor:
        """Random logits, peaked and flat rows in turn, with bad rows where there is room."""
        x = self.normal(self.n, self.v)
        x[::2] *= 7.0
        x[1::2] *= 2.0
        if self.n >= 8 and self.v >= 15:
            x[2], x[3] = -math.inf, -math.inf
            x[2, self.v // 2] = 1.0
            x[4, 5], x[5, self.v - 1] = math.nan, math.inf
            x[6, 1::3] = -math.inf
        return self.placed(x, self.form(0))

    def draw(self, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(seed and counter, keys of the rows)."""
        rng = torch.tensor([1234, number], dtype=torch.int64, device=self.device)
        return rng, torch.arange(self.n, dtype=torch.int64, device=self.device) * ((1 << 33) + 1)


Outputs = tuple[torch.Tensor, ...]
# A call, and what its results are compared with: [(name, its number among the results, truth, bound), ...] are told
# by the function, given those results.
Problem = tuple[Callable[[], Outputs], Callable[[Outputs], Iterator[Finding]]]


def _compared(name: str, ours: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor | float) -> Finding:
    """The worst error over its bound; infinite where NaN or an infinity stands on one side alone."""
    ours, exact = ours.double(), exact.double()
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    error = torch.where(same, 0.0, (ours - exact).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    excess = torch.where(same, 0.0, error / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    if error.numel() == 0:
        return Finding(name, 0.0, 0.0)
    return Finding(name, float(excess.max()), float(error.max()))


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _tokens(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Finding:
    """Draws: one tie within rounding is let pass."""
    wrong = float((ours != theirs).sum())
    return Finding(name, wrong / 1.5, wrong)


def _filter_arguments(filters: str, top_p: float) -> tuple[int, float]:
    return (50 if filters.startswith("k") else 0), (top_p if filters.endswith("p") else 1.0)


def _near(exact: torch.Tensor, share: float = 2e-5) -> torch.Tensor:
    return share * (1.0 + exact.abs()).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)


def _product_bound(operand: torch.dtype, mass: torch.Tensor) -> torch.Tensor | float:
    """16-bit operands hold the exact problems' numbers: a quarter of their smallest step. float32 ones are split."""
    return 2.0**-18 if operand.itemsize == 2 else 1e-5 * mass + 1e-6


def _try_statistics(make: _Maker, kernels: Any) -> Iterator[Problem]:
    for logits, tau in ((make.rows(), 0.7), (make.powers(), 1 / _LN2)):

        def found(out, logits=logits, tau=tau):
            for name, ours, exact in zip(
                ("lse", "entropy"), out, eager.softmax_entropy(logits.double(), tau), strict=True
            ):
                yield _compared(name, ours, exact, _near(exact))

        def call(logits=logits, tau=tau):
            return kernels.softmax_entropy(logits, tau)

        yield call, found


def _try_statistics_backward(make: _Maker, kernels: Any) -> Iterator[Problem]:
    logits = make.powers()
    lse, entropy = eager.softmax_entropy(logits.double(), 0.7)
    grads = make.normal(2, make.n)
    narrow = [lse.float(), entropy.float(), *grads]

    def found(out):
        wide = [x.double() for x in narrow]
        exact = eager.softmax_entropy_backward(logits.double(), *wide, 0.7)
        log_p = (logits.double() / 0.7 - wide[0][:, None]).clamp(min=-1e4)
        terms = log_p.exp() * (wide[2].abs()[:, None] + wide[3].abs()[:, None] * (log_p.abs() + wide[1][:, None])) / 0.7
        yield _compared("gradient", out[0], exact, _eps(out[0].dtype) * exact.abs() + 2e-5 * terms + 1e-7)

    yield lambda: (kernels.softmax_entropy_backward(logits, *narrow, 0.7),), found


def _try_sample(make: _Maker, kernels: Any) -> Iterator[Problem]:
    (filters,) = make.trial.flags
    for logits, tau, p in ((make.rows(), 0.7, 0.95), (make.powers(), 1 / _LN2, 0.6)):
        tau = 0.0 if filters == "argmax" else tau
        rest = (tau, *_filter_arguments(filters, p))
        draws = [make.draw(number) for number in range(1 if filters == "argmax" else 2)]

        def found(out, logits=logits, rest=rest, draws=draws):
            if rest[0] == 0:  # of equal logits any is an argmax; the bad rows are the same
                best = logits.gather(1, out[0].clamp(min=0)[:, None])[:, 0]
                good = logits.isfinite().any(1) & ~(logits.isnan() | (logits == math.inf)).any(1)
                worst = torch.where(good, best != logits.amax(1), out[0] != -1).sum()
                yield Finding("argmax", 2.0 * float(worst), float(worst))
                return
            theirs = torch.cat([eager.sample_tokens(logits, Draw(*draw, *rest)) for draw in draws])
            yield _tokens("tokens", out[0], theirs)

        def call(logits=logits, rest=rest, draws=draws):
            return (torch.cat([kernels.sample_tokens(logits, Draw(*draw, *rest)) for draw in draws]),)

        yield call, found


def _try_soft(make: _Maker, kernels: Any) -> Iterator[Problem]:
    logits, table = make.powers(), make.integers(make.v, make.d, 8, make.form(1))

    def found(out):
        exact, lse = eager.soft_embedding(logits.double(), table, 1 / _LN2)
        mass = eager.soft_embedding(logits.double(), table.abs(), 1 / _LN2)[0]
        yield _compared("soft embedding", out[0], exact, _product_bound(table.dtype, mass))
        yield _compared("lse", out[1], lse, _near(lse))

    yield lambda: kernels.soft_embedding(logits, table, 1 / _LN2), found


def _try_entrgi(make: _Maker, kernels: Any) -> Iterator[Problem]:
    filters, plain = make.trial.flags
    table = make.integers(make.v, make.d, 8, make.form(1))
    keys = make.draw()[1]
    given = keys % make.v if filters == "undrawn" else None
    placed = make.trial.forms[2] is not None
    index = torch.randperm(2 * make.n, generator=make.generator, device=make.device)[: make.n] if placed else None
    tau = 1.0 if plain else 1 / _LN2
    for number, logits in enumerate((make.powers(flat=plain), make.rows())):
        rng = make.draw(number)[0]
        rest = (tau, *_filter_arguments("" if given is not None else filters, 0.95 if number else 0.6))

        def call(logits=logits, rng=rng, rest=rest):
            placement = None
            if index is not None:
                blank = torch.full((2 * make.n, make.d), math.nan, dtype=torch.float32, device=make.device)
                placement = Placement(make.placed(blank, make.form(2)), index)
            return kernels.entrgi_embedding(logits, table, Draw(rng, keys, *rest), given, None, "entropy", placement)

        def found(out, logits=logits, rng=rng, rest=rest, exactly=number == 0):
            mixed, tokens, weight, entropy, soft, lse, top = out
            wide = logits.double()
            good = ~eager.softmax_entropy(wide, 1.0)[1].isnan()
            theirs = given if given is not None else eager.sample_tokens(logits, Draw(rng, keys, *rest))
            yield _tokens("tokens", tokens, theirs)
            truth = eager.softmax_entropy(wide, 1.0)[1]
            yield _compared("entropy", entropy, truth, _near(truth))
            yield _compared("weight", weight, truth / (math.log(make.v) or 1.0), 2e-5)
            exact, sums = eager.soft_embedding(wide, table, tau)
            mass = eager.soft_embedding(wide, table.abs(), tau)[0].nan_to_num(nan=1.0)
            bound = _product_bound(table.dtype, mass) if exactly else _eps(table.dtype) * mass + 1e-5 * (1 + mass)
            yield _compared("soft embedding", soft, exact, bound)
            yield _compared("lse", lse, sums, _near(sums))
            # What the kernel made of its own sums, which have passed above.
            hard = table[tokens.clamp(min=0)].double()
            blend = torch.lerp(soft.double(), hard, weight.double()[:, None])
            if index is not None:
                whole = torch.full((2 * make.n, make.d), math.nan, dtype=torch.float64, device=make.device)
                blend = whole.index_copy_(0, index, blend)
            size = blend.abs().nan_to_num(nan=1.0)
            yield _compared("blend", mixed, blend, _eps(mixed.dtype) * size + 1e-5 * (1 + size))
            best = wide.gather(1, top.clamp(0, make.v - 1)[:, None])[:, 0]
            wrong = float((good & (best != wide.amax(1))).sum())
            yield Finding("argmax", 2.0 * wrong, wrong)

        yield call, found


def _update_inputs(make: _Maker) -> tuple[torch.Tensor, ...]:
    """Logits, table, gradient, soft embedding, log-sum-exp: products and p are exact."""
    wide = make.trial.flags[0]
    logits, table = make.powers(), make.integers(make.v, make.d, 4, make.form(1))
    grad, soft = make.integers(make.n, make.d, 2, make.form(2)), make.integers(make.n, make.d, 4).to(wide)
    return logits, table, grad, soft, eager.softmax_entropy(logits.double(), 1 / _LN2)[0].to(wide)


def _try_soft_backward(make: _Maker, kernels: Any) -> Iterator[Problem]:
    logits, table, grad, soft, lse = _update_inputs(make)

    def found(out):
        exact = eager.soft_embedding_backward(logits.double(), table, grad, soft.double(), lse.double(), 1 / _LN2)
        small = torch.finfo(out[0].dtype).smallest_normal
        yield _compared("gradient", out[0], exact, (_eps(out[0].dtype) + 1e-5) * exact.abs() + max(small, 1e-9))

    yield lambda: (kernels.soft_embedding_backward(logits, table, grad, soft, lse, 1 / _LN2),), found


def _try_update(make: _Maker, kernels: Any) -> Iterator[Problem]:
    logits, table, grad, soft, lse = _update_inputs(make)
    _, reads, keep = make.trial.flags
    step, tau = 3 if reads else 1, 1 / _LN2
    start = []
    if make.trial.forms[3] is not None:
        first = 0.01 * make.normal(make.n, make.v) if reads else torch.full_like(logits, math.nan).float()
        second = 1e-4 * make.normal(make.n, make.v).square() if reads else first
        start = [make.placed(first, make.form(3)), make.placed(second, make.form(4))]
    memory = [make.placed(x, make.form(place)) for x, place in zip([logits, *start], (0, 3, 4), strict=False)]

    def call():
        for to, source in zip(memory, [logits, *start], strict=True):
            to.copy_(source)
        moments = memory[1:] or (None, None)
        kernels.guidance_update_(memory[0], grad, table, soft, lse, tau, Adam(*moments, step, **_ADAM, keep=keep))
        return tuple(x.clone() for x in memory)

    def found(out):
        exact = [x.double() for x in (logits, *start)]
        adam = Adam(*(exact[1:] or (None, None)), step, **_ADAM, keep=keep)
        eager.guidance_update_(exact[0], grad, table, soft.double(), lse.double(), tau, adam)
        size = exact[0].abs().nan_to_num(posinf=1.0)
        yield _compared("logits", out[0], exact[0], _eps(logits.dtype) * size + 1e-4 * _ADAM["lr"])
        for name, ours, old, truth in zip(("first moment", "second moment"), out[1:], start, exact[1:], strict=False):
            small = torch.finfo(ours.dtype).smallest_normal
            terms = truth.abs() + old.double().abs().nan_to_num()
            bound = _eps(ours.dtype) * truth.abs() + 2e-5 * terms + max(small * _eps(ours.dtype), 1e-12)
            yield _compared(name, ours, truth, bound)

    yield call, found


def _try_first_order(make: _Maker, kernels: Any) -> Iterator[Problem]:
    logits, table = make.powers(), make.integers(make.v, make.d, 4, make.form(1))
    grad, memory = make.integers(make.n, make.d, 2, make.form(2)), make.placed(logits, make.form(0))
    tokens = make.draw()[1] % make.v
    tokens[1 : make.n // 2 : 8] = -1  # as of bad rows

    def call():
        memory.copy_(logits)
        kernels.first_order_update_(memory, grad, table, tokens, _SCALE)
        return (memory.clone(),)

    def found(out):
        exact = logits.double()
        eager.first_order_update_(exact, grad, table, tokens, _SCALE)
        yield _compared("logits", out[0], exact, _eps(logits.dtype) * exact.abs().nan_to_num(posinf=1.0) + 1e-4)

    yield call, found


def _try_grad_table(make: _Maker, kernels: Any) -> Iterator[Problem]:
    (dtype,) = make.trial.flags
    logits, grad = make.powers(), make.integers(make.n, make.d, 4, make.form(1))
    lse = eager.softmax_entropy(logits.double(), 1 / _LN2)[0].float()

    def found(out):
        exact = eager.soft_embedding_grad_table(logits, grad, lse.double(), 1 / _LN2, torch.float64)
        mass = eager.soft_embedding_grad_table(logits, grad.abs(), lse.double(), 1 / _LN2, torch.float64)
        operand = dtype if dtype == grad.dtype else torch.float32
        yield _compared("gradient", out[0], exact, _eps(dtype) * exact.abs() + _product_bound(operand, mass))

    yield lambda: (kernels.soft_embedding_grad_table(logits, grad, lse, 1 / _LN2, dtype),), found


def _try_confidence(make: _Maker, kernels: Any) -> Iterator[Problem]:
    alg, filters = make.trial.flags
    for logits, tau, p, share in ((make.rows(), 0.7, 0.95, 1e-3), (make.powers(), 1 / _LN2, 0.6, 2e-5)):
        # The likeliest token in even rows, any in odd ones.
        even = torch.arange(make.n, device=make.device) % 2 == 0
        tokens = torch.where(even, logits.float().nan_to_num().argmax(1), make.draw()[1] % make.v)
        rest = (alg, tau, *_filter_arguments(filters, p))

        def found(out, logits=logits, tokens=tokens, rest=rest, share=share):
            exact = eager.unmask_confidence(logits.double(), tokens, *rest)
            yield _compared(alg, out[0], exact, _near(exact, share))

        def call(logits=logits, tokens=tokens, rest=rest):
            return (kernels.unmask_confidence(logits, tokens, *rest),)

        yield call, found


_TRIALS: dict[str, Callable[[_Maker, Any], Iterator[Problem]]] = {
    "softmax_entropy": _try_statistics,
    "softmax_entropy_backward": _try_statistics_backward,
    "sample_tokens": _try_sample,
    "soft_embedding": _try_soft,
    "soft_embedding_backward": _try_soft_backward,
    "soft_embedding_grad_table": _try_grad_table,
    "entrgi_embedding": _try_entrgi,
    "guidance_update_": _try_update,
    "first_order_update_": _try_first_order,
    "unmask_confidence": _try_confidence,
}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _differing(one: Outputs, other: Outputs) -> torch.Tensor:
    """How many entries are not the same bits; stays on the device."""
    pairs = zip(one, other, strict=True)
    return torch.stack([(a.view(_BITS[a.itemsize]) != b.view(_BITS[b.itemsize])).sum() for a, b in pairs]).sum()


def problems(trial: Trial, kernels: Any, device: torch.device) -> Iterator[Problem]:
    """What a trial consists of: each a call, and what its results are compared with."""
    return _TRIALS[trial.op](_Maker(trial, device), kernels)


@contextmanager
def _plain_torch(device: torch.device) -> Iterator[None]:
    """Torch as it is by default: a caller's autocast would change eager's arithmetic, its demand for determinism refuse
    parts of it."""
    strict, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=only_warns)


def run(trial: Trial, kernels: Any, device: torch.device, launches: int | None = None) -> list[Finding]:
    """Compare `kernels` (a backend's module) with eager arithmetic; waits for the device. What a kernel raises goes on.

    Each problem is launched `launches` times (:data:`LAUNCHES` where None, two at the least). Stops after the first one
    with a finding above its bound.
    """
    findings: list[Finding] = []
    launches = launches or LAUNCHES
    with _plain_torch(device):
        for call, found in problems(trial, kernels, device):
            first = call()
            # The allocator gives the same memory again: what nobody writes is NaN.
            poison = [torch.full_like(x, math.nan if x.is_floating_point() else -77) for x in first]
            del poison
            outputs = call()
            findings += found(outputs)
            changed = [_differing(first, outputs)]
            changed += [_differing(call(), outputs) for _ in range(launches - 2)]
            counts = torch.stack(changed).tolist()
            wrong = sum(count > 0 for count in counts)
            findings.append(Finding(f"launches of {launches} that differ", 2.0 * wrong, float(wrong)))
            if any(finding.excess > 1 for finding in findings):
                break
    return findings
