"""Guidance of one denoising step: M Adam steps on the open slots' logits, each through the reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ops import make_rng
from ..rewards import PreparedPrompts, Reward, Targets
from ..rewards.base import reward_gradient
from . import ranges
from .buffers import Buffers
from .canvas import Canvas, OpenSlots
from .config import GuidanceConfig
from .keys import step_key
from .optimizer import LogitOptimizer
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
        optimizer: takes it.
    """

    weights: torch.Tensor
    unreadable: torch.Tensor
    rewards: torch.Tensor
    gradients: torch.Tensor
    pending: torch.Tensor | None
    optimizer: LogitOptimizer

    @property
    def before(self) -> torch.Tensor:
        """[R], rewards that the first inner step saw."""
        return self.rewards[0]

    @property
    def after(self) -> torch.Tensor:
        """[R], rewards that the last inner step saw."""
        return self.rewards[-1]

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


@dataclass
class Scorer:
    """The reward of a batch's trajectories.

    Attributes:
        reward: the adapter.
        prepared: the prompts on its side.
        index: int64 [R], each trajectory's prompt in `prepared`.
        eos_token_id, pad_token_id: of the diffusion model's vocabulary.
        config: settings.
        tokenizer, vocab_size: of the diffusion model, for rewards that look at tokens.
    """

    reward: Reward
    prepared: PreparedPrompts
    index: torch.Tensor
    eos_token_id: int
    pad_token_id: int
    config: GuidanceConfig
    tokenizer: Any
    vocab_size: int

    @property
    def takes_committed(self) -> bool:
        """Whether the reward makes use of how much of the responses' left part is settled."""
        return bool(getattr(self.reward, "takes_committed", False))

    def __call__(
        self,
        response: torch.Tensor,
        best: torch.Tensor,
        settled: int | None = None,
        opened: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Rewards [R] of response embeddings [R, L, D] whose tokens are, most likely, `best` [R, L].

        Args:
            settled: leading slots of every response that nothing can change any more; None tells nothing.
            opened: rows and slots [N] of the slots still open, and their logits phi [N, V]; None when there are none.
        """
        given: dict[str, Any] = {} if settled is None else {"committed": settled}
        if getattr(self.reward, "takes_targets", False):
            rows, slots, phi = opened or (None, None, None)
            given["targets"] = Targets(
                self.tokenizer,
                self.vocab_size,
                best,
                best == self.eos_token_id,
                rows,
                slots,
                phi,
                self.config.temperature,
                self.config.backend,
            )
        return self.reward.score_embeddings(self.prepared, self.index, response, self.alive(best), **given)

    def alive(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, L] bool: slots that the reward model attends to. Dead: pads, and all that follows an EOS."""
        return ~(self.after_eos(tokens == self.eos_token_id) | (tokens == self.pad_token_id))

    def settled(self, tokens: torch.Tensor, open_slots: torch.Tensor) -> torch.Tensor:
        """How many leading slots of every response [R, L] are settled, int64 [1]: committed, or behind such an EOS."""
        eos = (tokens == self.eos_token_id) & ~open_slots
        fixed = ~open_slots | self.after_eos(eos)
        return fixed.long().cumprod(dim=1).sum(dim=1).amin(dim=0, keepdim=True)

    @staticmethod
    def after_eos(eos: torch.Tensor) -> torch.Tensor:
        """[R, L] bool: slots with an EOS before them."""
        return (eos.cumsum(dim=1) - eos.long()) > 0


class InnerLoop:
    """The M inner steps, on memory of the batch; may be captured in a CUDA graph (:mod:`.capture`).

    Args:
        score: the reward.
        table: [V, D], its embeddings seen through the vocabulary map.
        config: settings.
        buffers: the batch's memory.
    """

    def __init__(self, score: Scorer, table: torch.Tensor, config: GuidanceConfig, buffers: Buffers) -> None:
        weight = method_weight(config.method, config.weight)
        assert weight is not None
        self._score, self._table, self._config, self._buffers, self._weight = score, table, config, buffers, weight

    def __call__(
        self, phi: torch.Tensor, opened: OpenSlots, canvas: Canvas, step: int, settled: int | None, defer: bool
    ) -> Guided:
        """Move phi [N, V] in place; with `defer` the last inner step is left to be taken for some rows only.

        Args:
            settled: see :class:`Scorer`; one number for all inner steps.
        """
        rngs = torch.stack([make_rng(phi, self._config.seed, step_key(step, m)) for m in range(self.length)])
        response = canvas.response
        return self.run(phi, opened.rows, opened.slots, opened.keys, response, rngs, settled, defer)

    @property
    def length(self) -> int:
        """M."""
        return self._config.guidance_steps

    def run(
        self,
        phi: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        keys: torch.Tensor,
        response: torch.Tensor,
        rngs: torch.Tensor,
        settled: int | None,
        defer: bool,
    ) -> Guided:
        """As the call, on tensors alone; nothing here waits for the device.

        Args:
            rows, slots, keys: [N]. Rows may be R: such rows of phi are guided like any other but reach no reward.
            response: [R, L] tokens.
            rngs: int64 [M, 2], (seed, counter) of each inner step's draw.
        """
        config = self._config
        saves_state = config.saves("adam_state")
        optimizer = LogitOptimizer(
            phi,
            self._table,
            lr=config.learning_rate,
            temperature=config.temperature,
            weight=self._weight,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=rngs,
            keys=keys,
            betas=config.betas,
            eps=config.eps,
            state_dtype=config.resolved_state_dtype(),
            keep_state=config.guidance_steps > 1 or not saves_state,
            buffers=self._buffers,
            backend=config.backend,
        )
        count, length = response.shape
        # One row more than there are trajectories, for rows of phi that belong to none.
        tokens = torch.nn.functional.pad(response, (0, 0, 0, 1))
        embedded = self._buffers.rows("response", self._table, tokens.flatten())
        index = rows * length + slots
        # Such rows take another's gradient: they have none, and nobody reads what becomes of them.
        source = index.clamp(max=count * length - 1)
        weights, values, sizes, grad = [], [], [], None
        unreadable = None
        for inner in range(config.guidance_steps):
            with ranges.scope(ranges.EMBED):
                blend = optimizer.embed(out=embedded, index=index)
            with torch.enable_grad():
                with ranges.scope(ranges.REWARD):
                    best = tokens.index_put((rows, slots), optimizer.argmax)[:count]
                    # The reward reads the very rows that were written; the next inner step writes them again.
                    filled = embedded[: count * length].view(count, length, -1).detach().requires_grad_()
                    value = self._score(filled, best, settled, (rows, slots, optimizer.phi))
                # The loss is minus the sum: a mean would change Adam's steps where gradients are near eps.
                with ranges.scope(ranges.REWARD_BACKWARD):
                    grad = reward_gradient(-value.sum(), filled, "the response's embeddings")
                    grad = grad.flatten(0, 1)[source]
                    sizes.append(torch.linalg.vector_norm(grad, torch.inf, dim=-1))
            if not (defer and inner == config.guidance_steps - 1):
                with ranges.scope(ranges.UPDATE):
                    optimizer.step(grad, last=saves_state and inner == config.guidance_steps - 1)
            unreadable = blend.entropy.isnan() if unreadable is None else unreadable
            weights.append(blend.weight)
            # A copy: a reward may be a view of the rows that the next inner step writes.
            values.append(value.detach().clone())
        assert unreadable is not None
        rewards, gradients = torch.stack(values), torch.stack(sizes)
        return Guided(torch.stack(weights), unreadable, rewards, gradients, grad if defer else None, optimizer)
