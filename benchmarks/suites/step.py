"""One guidance step: problems, gated candidates, and their measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.baselines.step import (
    BASELINES,
    GuidanceStep,
    Published,
    StepResult,
    batched_alive,
    batched_forward,
)
from benchmarks.harness import oracle
from benchmarks.harness.inputs import (
    Canvas,
    Reward,
    Shape,
    StepSettings,
    canvas,
    embedding_table,
    linear_reward,
    peaked_logits,
)
from benchmarks.harness.measure import Candidate, Group, measure
from benchmarks.harness.oracle import Check
from benchmarks.suites.fused import Fused, two_products

FLOOR = "two GEMMs"


@dataclass
class Problem:
    """The inputs of one measurement, shared by all candidates, and the truth about them on a few rows."""

    shape: Shape
    dtype: torch.dtype
    settings: StepSettings
    phi: torch.Tensor
    table: torch.Tensor
    canvas: Canvas
    reward: Reward
    device: str = "cpu"

    @classmethod
    def make(
        cls, shape: Shape, dtype: torch.dtype, settings: StepSettings | None = None, device: str = "cpu", seed: int = 0
    ) -> Problem:
        board = canvas(shape.n, shape.v, device=device, seed=seed + 2)
        return cls(
            shape,
            dtype,
            settings or StepSettings(),
            peaked_logits(shape.n, shape.v, dtype=dtype, device=device, seed=seed),
            embedding_table(shape.v, shape.d, dtype=dtype, device=device, seed=seed + 1),
            board,
            linear_reward(board, shape.d, dtype=dtype, seed=seed + 3),
            device,
        )

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Hard tokens [N] to inject: the second-best logit of each row, so that they differ from the argmax."""
        return self.phi.topk(min(2, self.shape.v), dim=-1).indices[:, -1].contiguous()

    @cached_property
    def rows(self) -> torch.Tensor:
        return oracle.chosen_rows(self.shape.n).to(self.phi.device)

    @cached_property
    def grad(self) -> torch.Tensor:
        """The gradient of the loss for the masked rows' embeddings, [N, D]; the reward is linear, so it is constant."""
        places = self.canvas.masked.nonzero(as_tuple=True)
        leaf = torch.zeros(self.shape.n, self.shape.d, dtype=self.dtype, device=self.phi.device, requires_grad=True)
        responses = torch.zeros(*self.canvas.tokens.shape, self.shape.d, dtype=self.dtype, device=self.phi.device)
        ids = self.canvas.tokens.index_put(places, self.phi.argmax(dim=-1))
        alive = batched_alive(ids, self.canvas.eos_id, self.canvas.pad_id)
        (grad,) = torch.autograd.grad(-self.reward(responses.index_put(places, leaf), alive).sum(), leaf)
        return grad

    @cached_property
    def truth(self) -> oracle.Truth:
        rows = self.rows
        return oracle.truth(self.phi[rows], self.table, self.tokens[rows], self.grad[rows], self.settings)

    @cached_property
    def torch_errors(self) -> dict[str, float]:
        """The errors of plain torch in this dtype on the chosen rows: what the bounds are made of."""
        s, rows = self.settings, self.rows
        phi = self.phi[rows].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([phi], lr=s.lr, betas=s.betas, eps=s.eps)
        tokens = self.tokens[rows]
        out = batched_forward(phi, self.table, tokens, s.temperature, s.top_p, s.top_k, s.weight)
        out[0].backward(self.grad[rows])
        optimizer.step()
        result = StepResult(out[0].detach(), tokens, out[2], out[3], torch.zeros(0))
        return self.errors(result, phi.detach(), take=False)

    def errors(self, result: StepResult, phi: torch.Tensor, take: bool = True) -> dict[str, float]:
        """Errors of a step's results against the truth, on the chosen rows."""
        exact, lr = self.truth, self.settings.lr
        pick = (lambda tensor: tensor[self.rows]) if take else (lambda tensor: tensor)
        start = self.phi[self.rows].double()
        update, wanted = pick(phi).double() - start, exact.phi - start
        return {
            "embedding": oracle.relative_error(pick(result.embedding), exact.embedding),
            "entropy": oracle.relative_error(pick(result.entropy), exact.entropy),
            "weight": oracle.relative_error(pick(result.weight), exact.weight),
            "update": float((update - wanted).abs().mean()) / lr if torch.isfinite(update).all() else float("inf"),
            "flips": oracle.flip_rate(update, wanted, lr),
        }

    def check(self, make: Callable[[], GuidanceStep], own: bool) -> Check:
        """The gate of a candidate: injected tokens for the arithmetic, then a drawn step for the sampler.

        Args:
            own: hold it to the project's rule for statistics (float32 whatever the dtype), not to plain torch in the
                logits' dtype: its draws must respect the nucleus to 2e-3, a bf16 cumulative sum gets 2e-2.
        """
        candidate = make()
        result = candidate.step(self.reward, self.tokens)
        errors, plain = self.errors(result, candidate.phi.detach()), self.torch_errors
        least = {torch.float64: 1e-9, torch.float32: 2e-5}.get(self.dtype, 4e-3)
        if not own:
            least += Published.log_epsilon * self.shape.v
        bounds = {name: 3 * plain[name] + (1e-3 if name in ("update", "flips") else least) for name in errors}
        checks = [oracle.compare(name, errors[name], bounds[name]) for name in errors]
        del candidate, result
        if self.settings.weight != "zero":
            drawn = make().step(self.reward).tokens[self.rows]
            s, coarse = self.settings, self.dtype in (torch.bfloat16, torch.float16) and not own
            slack = 2e-2 if coarse else 2e-3
            checks.append(oracle.in_nucleus(self.phi[self.rows], drawn, s.temperature, s.top_p, s.top_k, slack))
        return oracle.combine(checks)

    @property
    def flop(self) -> float:
        return 4.0 * self.shape.n * self.shape.v * self.shape.d

    @property
    def bytes_moved(self) -> float:
        """The least traffic of a step: the table twice; phi read twice and written, both moments read and written."""
        size = self.phi.element_size()
        return size * (2.0 * self.shape.v * self.shape.d + 7.0 * self.shape.n * self.shape.v)


def step_candidates(problem: Problem, names: Sequence[str]) -> list[Candidate]:
    """Candidates by name: baselines ("published", "vectorized", "compiled"), or backends ("auto", "eager", ...).

    Each is timed from its second step on: Adam's state exists, phi is put back before every run.
    """
    made = []
    for name in names:
        made.append(_candidate(problem, name))
    floor = two_products(problem.shape.n, problem.shape.v, problem.shape.d, problem.dtype, problem.device)
    return [*made, Candidate(FLOOR, floor, floor=True)]


def maker(problem: Problem, name: str) -> Callable[[], Any]:
    """A function that makes the named implementation of a step, with phi as the problem has it."""
    arguments = (problem.phi, problem.table, problem.canvas, problem.settings)
    if name in BASELINES:
        return lambda: BASELINES[name](*arguments)
    return lambda: Fused(*arguments, backend=name)


def _candidate(problem: Problem, name: str) -> Candidate:
    make = maker(problem, name)
    held: list[GuidanceStep] = []

    def prepare() -> None:
        if not held:
            held.append(make())
            held[0].step(problem.reward)
        with torch.no_grad():
            held[0].phi.copy_(problem.phi)

    return Candidate(
        name, lambda: held[0].step(problem.reward), lambda: problem.check(make, name not in BASELINES), prepare
    )


def measure_step(
    shape: Shape,
    dtype: torch.dtype,
    names: Sequence[str],
    *,
    device: str = "cpu",
    budget: float = 15.0,
    settings: StepSettings | None = None,
    rounds: tuple[int, int] = (3, 25),
) -> Group:
    """Gate and time one guidance step at a shape and dtype; see :func:`step_candidates` for `names`."""
    problem = Problem.make(shape, dtype, settings, device)
    return measure(
        "guidance_step",
        dtype,
        shape,
        step_candidates(problem, names),
        flop=problem.flop,
        bytes_moved=problem.bytes_moved,
        budget=budget,
        rounds=rounds,
        device=device,
    )


def memory_needed(shape: Shape, dtype: torch.dtype, names: Sequence[str]) -> float:
    """Bytes that a measurement of these candidates holds at its peak, a rough upper estimate."""
    size = torch.empty((), dtype=dtype).element_size()
    logits = float(shape.n * shape.v)
    held = size * logits * (2 + 4 * len(names) + 2)
    passing = logits * (14 * size + 24)  # the published loop's temporaries, and the indices of its sort
    return held + passing + 2 * size * shape.v * shape.d + 64e6 + 12 * shape.v * 8 * 8
