"""The denoising loop: guided logits, draws and commits over one batch of trajectories.

Every rule here is that of the published loop (arXiv 2602.05000 and its code), but for its known faults; the numbers of
an operator come from :mod:`entrgi_kernels.ops`, what the models compute from their adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..models import DiffusionModel
from ..ops import make_rng, sample_tokens, softmax_entropy, unmask_confidence
from ..rewards import PreparedPrompts, Reward
from . import selection
from .config import GuidanceConfig
from .keys import FINAL_DRAW, POSITIONS, step_key
from .optimizer import LogitOptimizer
from .results import StepTrace
from .schedules import plan
from .weights import method_weight


class NonFiniteLogitsError(ArithmeticError):
    """Logits were NaN or infinite.

    Attributes:
        step: the first denoising step in which they were.
        trajectory: the first trajectory of the batch that was hit in it.
    """

    def __init__(self, step: int, trajectory: int, where: str) -> None:
        self.step, self.trajectory = step, trajectory
        super().__init__(
            f"logits are NaN or infinite at denoising step {step}, {where}: expected finite logits; check the "
            "diffusion model's and the reward model's weights and dtype"
        )


@dataclass
class Canvas:
    """A batch of trajectories.

    Attributes:
        tokens: [R, S] int64, prompts left-padded, then the response with masks where nothing is committed.
        attention: [R, S] bool, False on padding.
        start: first response slot; the response is ``tokens[:, start:]``, L slots.
        masked: [R, L] bool, the slots still to be filled. Kept apart from the tokens: a prompt may hold the mask token.
        keys: [R, L] int64, keys of each slot's draws.
    """

    tokens: torch.Tensor
    attention: torch.Tensor
    start: int
    masked: torch.Tensor
    keys: torch.Tensor

    @property
    def response(self) -> torch.Tensor:
        """[R, L] view of the response's tokens."""
        return self.tokens[:, self.start :]

    def masked_positions(self) -> torch.Tensor:
        """[R, S] bool: `masked` over the whole canvas."""
        return torch.nn.functional.pad(self.masked, (self.start, 0))


@dataclass
class Statistics:
    """What a run did.

    Attributes:
        steps: denoising steps taken (those that commit nothing are skipped).
        model_forwards: forwards of the diffusion model, batches.
        reward_evaluations: forwards and backwards of the reward model under guidance, batches.
        mean_weight: mean share of the hard token over all rows and inner steps; None without guidance.
        seconds: wall-clock time of the whole run, models included.
    """

    steps: int = 0
    model_forwards: int = 0
    reward_evaluations: int = 0
    mean_weight: float | None = None
    seconds: float = 0.0
    _weights: list[torch.Tensor] = field(default_factory=list, repr=False)

    def finish(self, seconds: float) -> None:
        """Close the run: read what was gathered on the device."""
        self.seconds = seconds
        self.mean_weight = torch.stack(self._weights).mean().item() if self._weights else None

    def to_dict(self) -> dict[str, float | int | None]:
        """The figures as a JSON-safe dict."""
        return {
            name: getattr(self, name)
            for name in ("steps", "model_forwards", "reward_evaluations", "mean_weight", "seconds")
        }


@dataclass
class Denoiser:
    """Denoises one batch.

    Attributes:
        model: the diffusion model's adapter.
        reward: the reward model's adapter.
        table: [V, D], the reward's embeddings seen through the vocabulary map.
        config: settings.
        undrawable: int64 ids whose logits are set to -inf; empty leaves all alone.
        eos_token_id, pad_token_id: of the diffusion model's vocabulary.
    """

    model: DiffusionModel
    reward: Reward
    table: torch.Tensor
    config: GuidanceConfig
    undrawable: torch.Tensor
    eos_token_id: int
    pad_token_id: int

    @torch.no_grad()
    def run(
        self,
        canvas: Canvas,
        prepared: PreparedPrompts,
        index: torch.Tensor,
        *,
        statistics: Statistics,
        traces: list[list[StepTrace]] | None = None,
        on_step: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
        every_step: bool = False,
    ) -> torch.Tensor:
        """Fill every masked slot of the canvas, in place.

        Args:
            canvas: the batch.
            prepared: the prompts on the reward model's side.
            index: int64 [R], each trajectory's prompt in `prepared`.
            statistics: added to.
            traces: a list a trajectory to which every step is added; None keeps no trace.
            on_step: called after each step with (step, canvas tokens [R, S]); what it returns replaces the tokens.
            every_step: take steps that commit nothing too, for hosts that look at each step's logits.

        Returns:
            [R, L] int64, the responses.

        Raises:
            NonFiniteLogitsError: NaN or infinite logits, with the first step and the trajectory.
        """
        masked = canvas.masked.sum(dim=1).tolist()
        schedule = plan(self.config.schedule, masked, self.config.steps, self.config.schedule_eps)
        counts = torch.tensor(schedule.counts, dtype=torch.int64, device=index.device).view(len(schedule), len(index))
        failed = torch.full_like(index, -1)
        for step in range(len(schedule)):
            # With keyed draws and Adam fresh at every step, a step that commits nothing leaves no trace at all.
            idle = self.config.alg != "origin" and not any(schedule.counts[step]) and not every_step
            if not idle:
                self._step(
                    canvas, prepared, index, step, counts[step], schedule.shares[step], failed, statistics, traces
                )
                statistics.steps += 1
                if canvas.tokens.device.type == "cpu":
                    _raise_if_failed(failed)  # nothing to wait for on a CPU: stop at once
            if on_step is not None:
                replaced = on_step(step, canvas.tokens)
                if replaced is not None and replaced is not canvas.tokens:
                    canvas.tokens.copy_(replaced)
                    canvas.masked &= canvas.response == self.model.mask_token_id
        _raise_if_failed(failed)
        return canvas.response

    def _step(
        self,
        canvas: Canvas,
        prepared: PreparedPrompts,
        index: torch.Tensor,
        step: int,
        counts: torch.Tensor,
        share: float,
        failed: torch.Tensor,
        statistics: Statistics,
        traces: list[list[StepTrace]] | None,
    ) -> None:
        config = self.config
        rows, slots = canvas.masked.nonzero(as_tuple=True)
        if rows.numel() == 0:
            return
        phi = self.model.masked_logits(canvas.tokens, canvas.attention, canvas.masked_positions())
        statistics.model_forwards += 1
        if self.undrawable.numel():
            phi.index_fill_(1, self.undrawable, -torch.inf)
        keys = canvas.keys[rows, slots]
        base = self._base_confidence(phi)
        entropy = softmax_entropy(phi, backend=config.backend)[1] if traces is not None else None

        guided = (
            self._guide(phi, canvas, prepared, index, rows, slots, keys, step, statistics) if config.guided else None
        )

        drawn = sample_tokens(
            phi,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            step=step_key(step, FINAL_DRAW),
            rows=keys,
            backend=config.backend,
        )
        bad = torch.zeros_like(failed).index_put_((rows,), (drawn < 0).long(), accumulate=True) > 0
        failed.copy_(torch.where(bad & (failed < 0), step, failed))
        drawn = drawn.clamp(min=0)

        chosen = self._choose(canvas, phi, drawn, base, rows, slots, step, counts, share)
        proposal = canvas.response.index_put((rows, slots), drawn)
        canvas.response.copy_(torch.where(chosen, proposal, canvas.response))
        # A mask token can only be drawn where undrawable ids are left alone; its slot then stays open, as published.
        canvas.masked &= ~chosen | (canvas.response == self.model.mask_token_id)
        if traces is not None:
            best = canvas.response.masked_scatter(canvas.masked, phi.argmax(dim=-1)[canvas.masked[rows, slots]])
            value = self._score(prepared, index, self.table[best], best)
            self._trace(traces, canvas, rows, slots, step, entropy, guided, chosen, value)

    def _base_confidence(self, phi: torch.Tensor) -> torch.Tensor | None:
        """Minus the entropy before guidance, where that is what ranks the positions; phi is moved in place later."""
        config = self.config
        if config.alg != "entropy" or config.confidence != "base":
            return None
        nothing = torch.zeros(phi.shape[0], dtype=torch.int64, device=phi.device)
        return unmask_confidence(phi, nothing, alg="entropy", temperature=config.temperature, backend=config.backend)

    def _guide(
        self,
        phi: torch.Tensor,
        canvas: Canvas,
        prepared: PreparedPrompts,
        index: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        keys: torch.Tensor,
        step: int,
        statistics: Statistics,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Move phi in place by M Adam steps; returns the first inner step's weights [N], first and last rewards [R]."""
        config = self.config
        weight = method_weight(config.method, config.weight)
        assert weight is not None
        optimizer = LogitOptimizer(
            phi,
            self.table,
            lr=config.learning_rate,
            temperature=config.temperature,
            weight=weight,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            step=step_key(step, 0),
            rows=keys,
            betas=config.betas,
            eps=config.eps,
            state_dtype=config.resolved_state_dtype(),
            keep_state=config.guidance_steps > 1,
            backend=config.backend,
        )
        committed = self.table[canvas.response]
        weights, values = [], []
        for _ in range(config.guidance_steps):
            blend = optimizer.embed()
            best = canvas.response.index_put((rows, slots), optimizer.argmax)
            with torch.enable_grad():
                response = committed.index_put((rows, slots), blend.embedding)
                value = self._score(prepared, index, response, best)
                # The loss is minus the sum: a mean would change Adam's steps where gradients are near eps.
                (grad,) = torch.autograd.grad(-value.sum(), blend.embedding)
            optimizer.step(grad)
            weights.append(blend.weight)
            values.append(value.detach())
            statistics.reward_evaluations += 1
            statistics._weights.append(blend.weight.mean())
        return weights[0], values[0], values[-1]

    def _score(
        self, prepared: PreparedPrompts, index: torch.Tensor, response: torch.Tensor, best: torch.Tensor
    ) -> torch.Tensor:
        """Rewards [R] of response embeddings [R, L, D] whose tokens are, most likely, `best` [R, L]."""
        return self.reward.score_embeddings(prepared, index, response, self.alive(best))

    def alive(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, L] bool: slots that the reward model attends to. Dead: pads, and all that follows an EOS."""
        eos = tokens == self.eos_token_id
        after_eos = (eos.cumsum(dim=1) - eos.long()) > 0
        return ~(after_eos | (tokens == self.pad_token_id))

    def _choose(
        self,
        canvas: Canvas,
        phi: torch.Tensor,
        drawn: torch.Tensor,
        base: torch.Tensor | None,
        rows: torch.Tensor,
        slots: torch.Tensor,
        step: int,
        counts: torch.Tensor,
        share: float,
    ) -> torch.Tensor:
        """[R, L] bool: the slots this step commits."""
        config = self.config
        if config.alg == "origin":
            rng = make_rng(phi, config.seed, step_key(step, POSITIONS))
            return selection.independent_positions(canvas.masked, share, rng, canvas.keys)
        if base is None:
            base = unmask_confidence(
                phi,
                drawn,
                alg=config.alg,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                backend=config.backend,
            )
        if config.deprioritize_eos:
            base = base.masked_fill(drawn == self.eos_token_id, -torch.inf)
        confidence = torch.full(canvas.masked.shape, -torch.inf, dtype=base.dtype, device=base.device)
        confidence[rows, slots] = base
        if config.alg_temp:
            rng = make_rng(phi, config.seed, step_key(step, POSITIONS))
            return selection.drawn_positions(confidence, canvas.masked, counts, config.alg_temp, rng, canvas.keys)
        return selection.best_positions(confidence, canvas.masked, counts)

    def _trace(
        self,
        traces: list[list[StepTrace]],
        canvas: Canvas,
        rows: torch.Tensor,
        slots: torch.Tensor,
        step: int,
        entropy: torch.Tensor,
        guided: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
        chosen: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        def over_slots(column: torch.Tensor | None) -> list[list[float | None]]:
            grid: list[list[float | None]] = [[None] * canvas.masked.shape[1] for _ in traces]
            if column is not None:
                for row, slot, number in zip(rows.tolist(), slots.tolist(), column.tolist(), strict=True):
                    grid[row][slot] = number
            return grid

        weights, before, after = guided if guided is not None else (None, None, None)
        entropies, shares = over_slots(entropy), over_slots(weights)
        for row, trace in enumerate(traces):
            trace.append(
                StepTrace(
                    step=step,
                    tokens=canvas.response[row].tolist(),
                    entropy=entropies[row],
                    weight=shares[row],
                    committed=chosen[row].nonzero()[:, 0].tolist(),
                    reward=value[row].item(),
                    reward_before=None if before is None else before[row].item(),
                    reward_after=None if after is None else after[row].item(),
                )
            )


def _raise_if_failed(failed: torch.Tensor) -> None:
    bad = [(step, row) for row, step in enumerate(failed.tolist()) if step >= 0]
    if bad:
        step, row = min(bad)
        raise NonFiniteLogitsError(step, row, f"trajectory {row} of the batch")
