"""Each operator against plain torch, batched and compiled: candidates with their gates, and the floor of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.baselines.step import adam_, batched_draw, batched_forward
from benchmarks.harness import oracle
from benchmarks.harness.inputs import Shape
from benchmarks.harness.measure import Candidate, Group, measure
from benchmarks.harness.oracle import Check
from benchmarks.suites.step import Problem

OPS = (
    "softmax_entropy",
    "sample_tokens",
    "soft_embedding",
    "soft_embedding_backward",
    "entrgi_embedding",
    "guidance_update_",
    "unmask_confidence",
)
PLAIN = ("vectorized", "compiled")
_compiled: dict[str, Any] = {}


def plain_softmax_entropy(phi: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = phi / temperature
    scaled = scaled if phi.dtype == torch.float64 else scaled.float()
    log_p = scaled.log_softmax(dim=-1)
    return scaled.logsumexp(dim=-1), -(log_p.exp() * log_p).sum(dim=-1)


def plain_soft_embedding(phi: torch.Tensor, table: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.softmax(phi / temperature, dim=-1).to(table.dtype) @ table


def plain_backward(
    phi: torch.Tensor, table: torch.Tensor, grad: torch.Tensor, soft: torch.Tensor, temperature: float
) -> torch.Tensor:
    p = F.softmax(phi / temperature, dim=-1)
    return p * (grad @ table.t() - (grad * soft).sum(dim=-1, keepdim=True)) / temperature


def plain_confidence(phi: torch.Tensor, tokens: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    ordered, order = (phi / temperature).sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1)
    keep = mass.cumsum(dim=-1) - mass <= top_p
    keep[..., 0] = True
    p = torch.where(keep, mass, 0.0)
    place = (order == tokens.unsqueeze(-1)).to(p.dtype)
    return (p * place).sum(dim=-1) / p.sum(dim=-1)


def _plain(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if name == "vectorized":
        return function
    key = function.__name__
    if key not in _compiled:
        _compiled[key] = torch.compile(function, dynamic=False)
    return _compiled[key]


class OpSuite:
    """Candidates of every operator on one problem.

    Everything that a run needs is made once; a run is one call of one operator. In-place operators get phi back before
    every run. The gate runs the very call that is timed and compares its result, on a few rows, with float64.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        s = problem.settings
        self.filters = {"top_k": s.top_k, "top_p": s.top_p}
        self.least = {torch.float64: 1e-9, torch.float32: 2e-5}.get(problem.dtype, 8e-3)
        self.size = problem.phi.element_size()

    def candidates(self, op: str, backends: Sequence[str]) -> list[Candidate]:
        """Plain torch ("vectorized", "compiled"), the named backends, and the operator's floor."""
        return [self.candidate(op, name) for name in (*PLAIN, *backends)] + [self.floor(op)]

    def candidate(self, op: str, name: str) -> Candidate:
        """One implementation of an operator: "vectorized", "compiled" or a backend."""
        return getattr(self, f"_{op.rstrip('_')}")(name)

    def measure(self, op: str, backends: Sequence[str], **options: Any) -> Group:
        n, v, d = self.problem.shape.n, self.problem.shape.v, self.problem.shape.d
        products = {"soft_embedding": 1, "soft_embedding_backward": 1, "entrgi_embedding": 1, "guidance_update_": 1}
        logits_passes = {"guidance_update_": 6, "soft_embedding_backward": 2}.get(op, 1)
        flop = 2.0 * n * v * d * products.get(op, 0)
        moved = self.size * (float(v) * d * products.get(op, 0) + float(n) * v * logits_passes)
        return measure(
            op,
            self.problem.dtype,
            self.problem.shape,
            self.candidates(op, backends),
            flop=flop,
            bytes_moved=moved,
            device=self.problem.device,
            **options,
        )

    def floor(self, op: str) -> Candidate:
        """The least a machine needs: the operator's product, or a copy that moves as much as one read of phi."""
        p = self.problem
        if op in ("softmax_entropy", "sample_tokens", "unmask_confidence"):
            # A copy of half of the logits moves as many bytes as one read of all of them.
            flat = p.phi.view(-1)
            half = flat[: max(1, flat.numel() // 2)]
            target = torch.empty_like(half)
            return Candidate("copy", lambda: target.copy_(half), floor=True)
        if op in ("soft_embedding", "entrgi_embedding"):
            left, out = torch.rand_like(p.phi), torch.empty(p.shape.n, p.shape.d, dtype=p.dtype, device=p.phi.device)
            return Candidate("one GEMM", lambda: torch.mm(left, p.table, out=out), floor=True)
        out = torch.empty_like(p.phi)
        return Candidate("one GEMM", lambda: torch.mm(p.grad, p.table.t(), out=out), floor=True)

    def compare(self, name: str, value: torch.Tensor, exact: torch.Tensor, least: float | None = None) -> Check:
        return oracle.compare(name, oracle.relative_error(value[self.problem.rows], exact), least or self.least)

    def _softmax_entropy(self, name: str) -> Candidate:
        p, tau = self.problem, self.problem.settings.temperature
        if name in PLAIN:
            function = _plain(name, plain_softmax_entropy)

            def run() -> Any:
                return function(p.phi, tau)
        else:
            from entrgi_kernels import ops

            def run() -> Any:
                return ops.softmax_entropy(p.phi, tau, backend=name)

        def check() -> Check:
            log_p = (p.phi[p.rows].double() / tau).log_softmax(dim=-1)
            entropy = torch.special.entr(log_p.exp()).sum(dim=-1)
            lse, value = run()
            exact = (p.phi[p.rows].double() / tau).logsumexp(dim=-1)
            bound = self.least + (self.plain_entropy_noise(log_p, exact) if name in PLAIN else 0.0)
            return oracle.combine(
                [self.compare("logsumexp", lse, exact), self.compare("entropy", value, entropy, bound)]
            )

        return Candidate(name, run, check)

    def plain_entropy_noise(self, log_p: torch.Tensor, logsumexp: torch.Tensor) -> float:
        """How far rounding can take plain torch's entropy, relative to the largest: a baseline is held to no more.

        log p = x - logsumexp is rounded at the size of both, and V terms are added up in the same precision.
        """
        p = log_p.exp()
        size = (log_p + logsumexp[:, None]).abs() + logsumexp.abs()[:, None]
        terms = torch.where(p > 0, p * (1 + log_p).abs() * size, 0.0).sum(dim=-1)
        entropy = torch.special.entr(p).sum(dim=-1)
        eps = torch.finfo(torch.float64 if self.problem.dtype == torch.float64 else torch.float32).eps
        noise = eps * (terms + math.sqrt(log_p.shape[1]) * (1 + entropy))
        return float(noise.max() / entropy.max().clamp_min(1e-30))

    def _sample_tokens(self, name: str) -> Candidate:
        p, s = self.problem, self.problem.settings
        if name in PLAIN:
            function = _plain(name, batched_draw)

            def run() -> Any:
                return function(p.phi, s.temperature, s.top_p, s.top_k)
        else:
            from entrgi_kernels import ops

            def run() -> Any:
                return ops.sample_tokens(p.phi, temperature=s.temperature, seed=7, backend=name, **self.filters)

        def check() -> Check:
            coarse = name in PLAIN and p.dtype in (torch.bfloat16, torch.float16)
            tokens, slack = run()[p.rows], 2e-2 if coarse else 2e-3
            checks = [oracle.in_nucleus(p.phi[p.rows], tokens, s.temperature, s.top_p, s.top_k, slack)]
            if name not in PLAIN:
                from entrgi_kernels import ops

                expected = ops.sample_tokens(
                    p.phi[p.rows], temperature=s.temperature, seed=7, backend="eager", keys=p.rows, **self.filters
                )
                checks.append(Check(torch.equal(tokens, expected), "draws equal the eager oracle's"))
            return oracle.combine(checks)

        return Candidate(name, run, check)

    def _soft_embedding(self, name: str) -> Candidate:
        p, tau = self.problem, self.problem.settings.temperature
        if name in PLAIN:
            function = _plain(name, plain_soft_embedding)

            def run() -> Any:
                return function(p.phi, p.table, tau)
        else:
            from entrgi_kernels import ops

            def run() -> Any:
                return ops.soft_embedding(p.phi, p.table, temperature=tau, backend=name)

        return Candidate(name, run, lambda: self.compare("soft", run(), p.truth.soft, self._product_bound()))

    def _product_bound(self) -> float:
        """Plain torch's own error in this dtype, three times, and a little more."""
        p = self.problem
        plain = plain_soft_embedding(p.phi[p.rows], p.table, p.settings.temperature)
        return 3 * oracle.relative_error(plain, p.truth.soft) + self.least

    def _soft_embedding_backward(self, name: str) -> Candidate:
        p, tau = self.problem, self.problem.settings.temperature
        soft = plain_soft_embedding(p.phi, p.table, tau)
        if name in PLAIN:
            function = _plain(name, plain_backward)

            def run() -> Any:
                return function(p.phi, p.table, p.grad, soft, tau)
        else:
            from entrgi_kernels import ops

            leaf = p.phi.detach().clone().requires_grad_(True)
            out = ops.soft_embedding(leaf, p.table, temperature=tau, backend=name)

            def run() -> Any:
                return torch.autograd.grad(out, leaf, p.grad.to(out.dtype), retain_graph=True)[0]

        def check() -> Check:
            plain = plain_backward(p.phi[p.rows], p.table, p.grad[p.rows], soft[p.rows], tau)
            bound = 3 * oracle.relative_error(plain, p.truth.grad) + self.least
            return self.compare("gradient", run(), p.truth.grad, bound)

        return Candidate(name, run, check)

    def _entrgi_embedding(self, name: str) -> Candidate:
        p, s = self.problem, self.problem.settings
        if name in PLAIN:
            function = _plain(name, batched_forward)

            def run(tokens: torch.Tensor | None = None) -> Any:
                with torch.no_grad():
                    return function(p.phi, p.table, tokens, s.temperature, s.top_p, s.top_k, s.weight)
        else:
            from entrgi_kernels import ops

            def run(tokens: torch.Tensor | None = None) -> Any:
                return ops.entrgi_embedding(
                    p.phi,
                    p.table,
                    temperature=s.temperature,
                    weight=s.weight,
                    tokens=tokens,
                    seed=7,
                    backend=name,
                    **self.filters,
                )

        def check() -> Check:
            plain, bound = p.torch_errors, self.least
            given, drawn = run(p.tokens), run()
            coarse = name in PLAIN and p.dtype in (torch.bfloat16, torch.float16)
            return oracle.combine(
                [
                    self.compare("embedding", given[0], p.truth.embedding, 3 * plain["embedding"] + bound),
                    self.compare("weight", given[2], p.truth.weight, 3 * plain["weight"] + bound),
                    self.compare("entropy", given[3], p.truth.entropy, 3 * plain["entropy"] + bound),
                    oracle.in_nucleus(
                        p.phi[p.rows], drawn[1][p.rows], s.temperature, s.top_p, s.top_k, 2e-2 if coarse else 2e-3
                    ),
                ]
            )

        return Candidate(name, run, check)

    def _guidance_update(self, name: str) -> Candidate:
        p, s = self.problem, self.problem.settings
        phi, tau = p.phi.clone(), s.temperature
        soft = plain_soft_embedding(p.phi, p.table, tau)
        if name in PLAIN:
            back, adam = _plain(name, plain_backward), _plain(name, adam_)
            mean, square = torch.zeros_like(phi), torch.zeros_like(phi)
            scale = torch.tensor([s.lr / (1 - s.betas[0]), math.sqrt(1 - s.betas[1])], device=phi.device)

            def run() -> Any:
                adam(phi, back(phi, p.table, p.grad, soft, tau), mean, square, scale, s)

            def reset(taken: int) -> None:
                mean.zero_(), square.zero_()
        else:
            from entrgi_kernels import ops

            # What the forward of the same backend leaves behind, as in use: soft and log-sum-exp in accumulation dtype.
            left = ops.entrgi_embedding(p.phi, p.table, temperature=tau, tokens=p.tokens, backend=name).state
            moments = ops.AdamState(torch.zeros_like(phi), torch.zeros_like(phi))

            def run() -> Any:
                ops.guidance_update_(
                    phi,
                    p.grad,
                    p.table,
                    left,
                    adam=moments,
                    lr=s.lr,
                    betas=s.betas,
                    eps=s.eps,
                    backend=name,
                )

            def reset(taken: int) -> None:
                moments.exp_avg.zero_(), moments.exp_avg_sq.zero_()
                moments.step = taken

        def prepare() -> None:
            phi.copy_(p.phi)
            reset(1)  # what is timed is a second step: a first one reads no moments

        def check() -> Check:
            phi.copy_(p.phi)
            reset(0)
            run()
            start = p.phi[p.rows].double()
            update, wanted = phi[p.rows].double() - start, p.truth.phi - start
            flips = oracle.flip_rate(update, wanted, s.lr)
            mean_error = float((update - wanted).abs().mean()) / s.lr
            plain = p.torch_errors
            return oracle.combine(
                [
                    oracle.compare("flips", flips, 3 * plain["flips"] + 1e-3),
                    oracle.compare("update", mean_error, 3 * plain["update"] + 1e-3),
                ]
            )

        return Candidate(name, run, check, prepare)

    def _unmask_confidence(self, name: str) -> Candidate:
        p, s = self.problem, self.problem.settings
        tokens = p.phi.argmax(dim=-1)
        if name in PLAIN:
            function = _plain(name, plain_confidence)

            def run() -> Any:
                return function(p.phi, tokens, s.temperature, s.top_p)
        else:
            from entrgi_kernels import ops

            def run() -> Any:
                return ops.unmask_confidence(
                    p.phi, tokens, alg="maskgit_plus", temperature=s.temperature, backend=name, **self.filters
                )

        def check() -> Check:
            exact = plain_confidence(p.phi[p.rows].double(), tokens[p.rows], s.temperature, s.top_p)
            coarse = name in PLAIN and p.dtype in (torch.bfloat16, torch.float16)
            return self.compare("confidence", run(), exact, 3e-2 if coarse else max(self.least, 1e-3))

        return Candidate(name, run, check)


def measure_ops(
    shape: Shape,
    dtype: torch.dtype,
    backends: Sequence[str],
    *,
    ops: Sequence[str] = OPS,
    device: str = "cpu",
    **options: Any,
) -> list[Group]:
    """Gate and time operators at a shape and dtype."""
    suite = OpSuite(Problem.make(shape, dtype, device=device))
    return [suite.measure(op, backends, **options) for op in ops]
