"""Guidance of one denoising step: M steps on the open slots' logits, each through the reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..names import METHODS
from ..ops import make_rng
from ..rewards.base import reward_gradient
from . import phases
from .canvas import OpenSlots
from .config import GuidanceConfig
from .first_order import FirstOrder
from .keys import draw_counter
from .memory import Memory
from .optimizer import LogitOptimizer
from .scoring import Scorer
from .weights import method_weight


@dataclass
class Guided:
    """What guidance leaves behind in one denoising step.

    Attributes:
        weights: [M, N], the hard token's share in every inner step.
        unreadable: [N] bool, rows of phi that were not finite before the first inner step.
        rewards: [M, R], what every inner step saw.
        gradients: [M, N], the largest absolute entry of every inner step's gradient.
        pending: [N, D], the last inner step's gradient where its update is still to be taken; else None.
        optimizer: takes it, see :meth:`finish`.
    """

    weights: torch.Tensor
    unreadable: torch.Tensor
    rewards: torch.Tensor
    gradients: torch.Tensor
    pending: torch.Tensor | None
    optimizer: LogitOptimizer | FirstOrder

    @property
    def before(self) -> torch.Tensor:
        """[R], rewards that the first inner step saw."""
        return self.rewards[0]

    @property
    def after(self) -> torch.Tensor:
        """[R], rewards that the last inner step saw."""
        return self.rewards[-1]

    def finish(self, rows: torch.Tensor) -> torch.Tensor:
        """phi [n, V] of some rows of phi, moved as far as it goes: a copy, good until the next call.

        Args:
            rows: int64 [n].
        """
        if self.pending is None:
            return self.optimizer.memory.rows("moved phi", self.optimizer.phi, rows)
        return self.optimizer.moved_rows(self.pending, rows)

    def faults(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which trajectories had a reward or a gradient that is not finite, without waiting for the device.

        Args:
            rows: int64 [N], the trajectory of each row of phi.

        Returns:
            ([R] bool, [R] rewards at the first inner step at fault: finite ones where the gradient was not).
        """
        bad = (~self.gradients.isfinite()).to(self.rewards.dtype)
        bad = torch.zeros_like(self.rewards).index_add_(1, rows, bad) > 0
        bad |= ~self.rewards.isfinite()
        first = bad.long().argmax(dim=0, keepdim=True)
        return bad.any(dim=0), self.rewards.gather(0, first)[0]


class InnerLoop:
    """The M inner steps, on memory of the batch; may be captured in a CUDA graph (:mod:`.capture`).

    Args:
        score: the reward.
        table: [V, D], its embeddings seen through the vocabulary map.
        config: settings.
        memory: the batch's memory.
    """

    def __init__(self, score: Scorer, table: torch.Tensor, config: GuidanceConfig, memory: Memory) -> None:
        weight = method_weight(config.method, config.weight)
        assert weight is not None
        self.score, self.table = score, table
        self._config, self._memory, self._weight = config, memory, weight

    def __call__(
        self,
        phi: torch.Tensor,
        opened: OpenSlots,
        response: torch.Tensor,
        step: int,
        settled: int | None = None,
        defer: bool = False,
    ) -> Guided:
        """Move phi [N, V] in place; with `defer` the last inner step is left to :meth:`Guided.finish`.

        Args:
            response: [R, L] tokens.
            step: the denoising step's number, for its draws.
            settled: see :class:`Scorer`; one number for all inner steps.
        """
        rngs = torch.stack(
            [make_rng(phi, self._config.seed, draw_counter(step, m)) for m in range(self._config.inner_steps)]
        )
        return self.run(phi, opened, response, rngs, settled, defer)

    def padded(self, rows: int) -> int:
        """How many rows of memory phi is kept in for that many open slots."""
        return rows

    def run(
        self,
        phi: torch.Tensor,
        opened: OpenSlots,
        response: torch.Tensor,
        rngs: torch.Tensor,
        settled: int | None,
        defer: bool,
    ) -> Guided:
        """As the call, on tensors alone; nothing here waits for the device.

        Args:
            opened: its rows may be R: such rows of phi are guided like any other but reach no reward.
            rngs: int64 [M, 2], (seed, counter) of each inner step's draw.
        """
        config, rows, slots = self._config, opened.rows, opened.slots
        steps, saves_state = config.inner_steps, config.saves("adam_state")
        optimizer = self._optimizer(phi, opened.keys, rngs)
        count, length = response.shape
        # One row more than there are trajectories, for rows of phi that belong to none.
        tokens = torch.nn.functional.pad(response, (0, 0, 0, 1))
        embedded = self._memory.rows("response", self.table, tokens.flatten())
        index = rows * length + slots
        # Such rows take another's gradient: they have none, and nobody reads what becomes of them.
        source = index.clamp(max=count * length - 1)
        weights, values, sizes, grad = [], [], [], None
        unreadable = None
        for inner in range(steps):
            with phases.scope(phases.EMBED):
                if isinstance(optimizer, FirstOrder):
                    weight, bad = optimizer.fill(embedded, index)
                else:
                    blend = optimizer.embed(out=embedded, index=index)
                    weight, bad = blend.weight, blend.entropy.isnan()
            with torch.enable_grad():
                with phases.scope(phases.REWARD):
                    best = tokens.index_put((rows, slots), optimizer.argmax)[:count]
                    # The reward reads the very rows that were written; the next inner step writes them again.
                    filled = embedded[: count * length].view(count, length, -1).detach().requires_grad_()
                    value = self.score(filled, best, settled, opened, optimizer.phi)
                # The loss is minus the sum: a mean would change Adam's steps where gradients are near eps.
                with phases.scope(phases.REWARD_BACKWARD):
                    grad = reward_gradient(-value.sum(), filled, "the response's embeddings")
                    grad = grad.flatten(0, 1)[source]
                    sizes.append(torch.linalg.vector_norm(grad, torch.inf, dim=-1))
            if not (defer and inner == steps - 1):
                with phases.scope(phases.UPDATE):
                    optimizer.step(grad, last=saves_state and inner == steps - 1)
            unreadable = bad if unreadable is None else unreadable
            weights.append(weight)
            # A copy: a reward may be a view of the rows that the next inner step writes.
            values.append(value.detach().clone())
        assert unreadable is not None
        rewards, gradients = torch.stack(values), torch.stack(sizes)
        return Guided(torch.stack(weights), unreadable, rewards, gradients, grad if defer else None, optimizer)

    def _optimizer(self, phi: torch.Tensor, keys: torch.Tensor, rngs: torch.Tensor) -> LogitOptimizer | FirstOrder:
        """What moves phi, fresh at every denoising step."""
        config = self._config
        common: dict[str, Any] = dict(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            keys=keys,
            memory=self._memory,
            backend=config.backend,
        )
        if not METHODS[config.method].adam:
            return FirstOrder(phi, self.table, scale=config.guidance_scale, rng=rngs[0], **common)
        return LogitOptimizer(
            phi,
            self.table,
            lr=config.learning_rate,
            weight=self._weight,
            seed=rngs,
            betas=config.betas,
            eps=config.eps,
            state_dtype=config.state_dtype,
            keep_state=config.inner_steps > 1 or not config.saves("adam_state"),
            **common,
        )
