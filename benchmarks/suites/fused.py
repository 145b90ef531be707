"""This project's guidance step behind the baselines' interface, and the floor it is held against."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.baselines.step import StepResult, batched_alive
from benchmarks.harness.inputs import Canvas, Reward, StepSettings


class Fused:
    """`entrgi_kernels.guidance.LogitOptimizer` with a backend of choice.

    Raises:
        entrgi_kernels.backends.BackendUnavailableError: at the first step, when the backend cannot serve.
    """

    def __init__(
        self,
        phi: torch.Tensor,
        table: torch.Tensor,
        canvas: Canvas,
        settings: StepSettings,
        *,
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        from entrgi_kernels.guidance.optimizer import LogitOptimizer

        self.name = backend
        self.canvas = canvas
        self.committed = table[canvas.tokens]
        self.places = canvas.masked.nonzero(as_tuple=True)
        s = settings
        self.optimizer = LogitOptimizer(
            phi.detach().clone(),
            table,
            lr=s.lr,
            temperature=s.temperature,
            weight=s.weight,
            top_k=s.top_k,
            top_p=s.top_p,
            seed=seed,
            betas=s.betas,
            eps=s.eps,
            backend=backend,
        )

    @property
    def phi(self) -> torch.Tensor:
        return self.optimizer.phi

    def step(self, reward: Reward, tokens: torch.Tensor | None = None) -> StepResult:
        result = self.optimizer.embed(tokens=tokens)
        leaf, canvas = result.embedding, self.canvas
        responses = self.committed.index_put(self.places, leaf)
        best = canvas.tokens.index_put(self.places, self.optimizer.argmax)
        rewards = reward(responses, batched_alive(best, canvas.eos_id, canvas.pad_id))
        (grad,) = torch.autograd.grad(-rewards.sum(), leaf)
        self.optimizer.step(grad)
        return StepResult(leaf.detach(), result.tokens, result.weight, result.entropy, rewards.detach())


def two_products(n: int, v: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Callable[[], None]:
    """The floor: P [N, V] @ E [V, D] and G [N, D] @ E^T, by torch.mm into buffers that exist already."""
    probability = torch.rand(n, v, device=device).to(dtype)
    table = torch.randn(v, d, device=device, dtype=torch.float32).to(dtype)
    forward, backward = (torch.empty(n, width, dtype=dtype, device=device) for width in (d, v))
    grad = torch.randn(n, d, device=device).to(dtype)

    def run() -> None:
        torch.mm(probability, table, out=forward)
        torch.mm(grad, table.t(), out=backward)

    return run
