"""Token log-probabilities under a vocabulary head, forward and backward: ours, plain torch, Liger and CCE.

    python -m benchmarks.suites.token_log_prob [--shapes 64,1024 ...] [--device cuda] [--json FILE]

Two cases: the head is frozen (LoRA: gradient of hidden alone) or it learns too. `plain` is what people write: a linear
layer, float32 log-softmax, gather. Liger's fused linear cross-entropy and Apple's cut-cross-entropy are measured where
they are installed and can run. The floor is the products alone: two with a frozen head, four when it learns, each once
over the whole vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import measure
from benchmarks.harness.inputs import Shape
from benchmarks.harness.measure import Candidate, Group
from benchmarks.harness.oracle import Check, chosen_rows
from entrgi_kernels import ops

CASES = {"frozen head": False, "learning head": True}
BASELINES = ("plain", "liger", "cut-cross-entropy")
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[N] log-probabilities through the logits [N, V]."""
    return F.linear(hidden, head).float().log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]


def liger(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross-entropy, a loss a token."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, head, targets, reduction="none")


def cut_cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Apple's cut-cross-entropy, a loss a token."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, head, targets, reduction="none")


class Problem:
    """Hidden states whose logits are peaked at the targets in part, a head, targets and an incoming gradient."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, learns: bool, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        n, v, d = shape.n, shape.v, shape.d
        self.shape, self.dtype, self.device, self.learns = shape, dtype, device, learns
        head = torch.randn(v, d, generator=g) / d**0.5
        self.targets = torch.randint(0, v, (n,), generator=g)
        # From open rows (Gaussian logits of deviation 2) to certain ones (the target 20 nats above the rest).
        pull = torch.linspace(0, 20, n)[torch.randperm(n, generator=g)]
        hidden = 2 * torch.randn(n, d, generator=g) + pull[:, None] * head[self.targets]
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.head = head.to(device, dtype).requires_grad_(learns)
        self.targets, self.grad = self.targets.to(device), torch.randn(n, generator=g).to(device)

    def run(self, function: Function) -> Callable[[], tuple[torch.Tensor, ...]]:
        """A call that gives (log-probabilities, gradient of hidden, of the head where it learns)."""
        leaves = [self.hidden, self.head] if self.learns else [self.hidden]

        def call() -> tuple[torch.Tensor, ...]:
            out = function(self.hidden, self.head, self.targets)
            return out.detach(), *torch.autograd.grad(out, leaves, self.grad.to(out.dtype))

        return call

    def check(self, function: Function) -> Callable[[], Check]:
        """Values and the gradient of hidden on a few rows against float64; the head's gradient on a block of tokens."""

        def compare() -> Check:
            found = self.run(function)()
            rows = chosen_rows(self.shape.n).to(self.device)
            hidden = self.hidden.detach()[rows].double().requires_grad_()
            head = self.head.detach().double()
            exact = (hidden @ head.T).log_softmax(-1).gather(-1, self.targets[rows][:, None])[:, 0]
            (slope,) = torch.autograd.grad(exact, hidden, self.grad[rows].double())
            pairs = [("log-probability", found[0][rows], exact.detach()), ("hidden", found[1][rows], slope)]
            if self.learns:
                token = int(self.targets[rows[0]])
                every = self.hidden.detach().double()
                p = (every @ head[token] - torch.cat([(e @ head.T).logsumexp(-1) for e in every.split(64)])).exp()
                change = self.grad.double() * ((self.targets == token).double() - p)
                pairs.append(("head", found[2][token], change @ every))
            least = {torch.float32: 2e-4, torch.float64: 1e-9}.get(self.dtype, 4e-2)
            said = []
            for name, ours, truth in pairs:
                error = float((ours.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-12))
                said.append(f"{name} {error:.1e}")
                if not error <= least:
                    return Check(False, f"{name}: relative error {error:.2e}, allowed {least:.0e}")
            return Check(True, ", ".join(said))

        return compare

    def products(self) -> Callable[[], None]:
        """The least that must be multiplied, in torch's own products."""
        hidden, head = self.hidden.detach(), self.head.detach()

        def call() -> None:
            logits = hidden @ head.T
            torch.mm(logits, head)
            if self.learns:  # the logits once more for the backward, and their transpose with hidden
                logits = hidden @ head.T
                torch.mm(logits.T, hidden)

        return call


def candidates(problem: Problem, backends: Sequence[str]) -> list[Candidate]:
    """Ours by backend, the baselines, the floor."""
    found: dict[str, Function] = {"plain": plain, "liger": liger, "cut-cross-entropy": cut_cross_entropy}
    for name in backends:
        found[name] = lambda *tensors, _name=name: ops.token_log_prob(*tensors, backend=_name)
    made = [Candidate(name, problem.run(function), problem.check(function)) for name, function in found.items()]
    return [*made, Candidate("products", problem.products(), floor=True)]


def measure_case(
    case: str, shape: Shape, dtype: torch.dtype, backends: Sequence[str], device: str = "cpu", budget: float = 10.0
) -> Group:
    """Gate and time all candidates of one case."""
    problem = Problem(shape, dtype, device, CASES[case])
    products = 4 if CASES[case] else 2
    flop = 2.0 * products * shape.n * shape.v * shape.d
    made = candidates(problem, backends)
    return measure.measure(f"token_log_prob, {case}", dtype, shape, made, flop=flop, budget=budget, device=device)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and add the rows to the device's results.

    Returns:
        0, or 1 when a backend of this project failed its check.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suites.token_log_prob", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape(256, 1024)], help="N,D or N,D,V")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--backends", nargs="+", help="of this project (default: native, eager; on a GPU triton, eager)"
    )
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of timed runs a case")
    parser.add_argument("--json", type=Path, help="where to write rows (default: benchmarks/results/<device>.json)")
    chosen = parser.parse_args(argv)
    backends = chosen.backends or (["native", "eager"] if chosen.device == "cpu" else ["triton", "eager"])
    groups = []
    for dtype in chosen.dtypes:
        for shape in chosen.shapes:
            for case in chosen.cases:
                options = {"device": chosen.device, "budget": chosen.budget}
                groups.append(measure_case(case, shape, getattr(torch, dtype), backends, **options))
                print(measure.table(groups[-1:], ["plain"]), end="\n\n", flush=True)
    measure.save(
        [row for group in groups for row in measure.rows(group, chosen.device)],
        chosen.json or measure.result_path(chosen.device),
    )
    return 1 if any(name not in BASELINES for group in groups for name in group.refused) else 0


if __name__ == "__main__":
    sys.exit(main())
