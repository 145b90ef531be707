"""The denoising loop: guided logits, draws and commits over one batch of trajectories.

Every rule here is that of the published loop (arXiv 2602.05000 and its code), but for its known faults; the numbers of
an operator come from :mod:`entrgi_kernels.ops`, what the models compute from their adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..backends import ranges
from ..models import DiffusionModel
from ..ops import make_rng, sample_tokens, softmax_entropy, unmask_confidence
from ..rewards import PreparedPrompts, Reward
from . import selection
from .canvas import Canvas, NonFiniteLogitsError, OpenSlots, Statistics
from .config import GuidanceConfig
from .keys import FINAL_DRAW, POSITIONS, step_key
from .optimizer import LogitOptimizer
from .results import StepTrace
from .schedules import plan
from .tracing import Trace
from .weights import method_weight

OnStep = Callable[[int, torch.Tensor], "torch.Tensor | None"]


@dataclass
class _Guided:
    """What guidance leaves behind in one denoising step.

    Attributes:
        weight: [N], the first inner step's weights.
        before, after: [R], rewards that the first and the last inner step saw.
        pending: [N, D], the last inner step's gradient where its update is still to be taken; else None.
        optimizer: takes it.
    """

    weight: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    pending: torch.Tensor | None
    optimizer: LogitOptimizer


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
        canvas: the trajectories; filled in place.
        prepared: the prompts on the reward model's side.
        index: int64 [R], each trajectory's prompt in `prepared`.
        statistics: added to.
    """

    model: DiffusionModel
    reward: Reward
    table: torch.Tensor
    config: GuidanceConfig
    undrawable: torch.Tensor
    eos_token_id: int
    pad_token_id: int
    canvas: Canvas
    prepared: PreparedPrompts
    index: torch.Tensor
    statistics: Statistics

    @torch.no_grad()
    def run(
        self,
        *,
        traces: list[list[StepTrace]] | None = None,
        on_step: OnStep | None = None,
        every_step: bool = False,
    ) -> torch.Tensor:
        """Fill every masked slot of the canvas, in place.

        Args:
            traces: a list a trajectory to which every step is added; None keeps no trace.
            on_step: called after each step with (step, canvas tokens [R, S]); what it returns replaces the tokens.
            every_step: take steps that commit nothing too, for hosts that look at each step's logits.

        Returns:
            [R, L] int64, the responses.

        Raises:
            NonFiniteLogitsError: NaN or infinite logits, with the first step and the trajectory.
        """
        config, canvas = self.config, self.canvas
        left = canvas.masked.sum(dim=1).tolist()
        schedule = plan(config.schedule, left, config.steps, config.schedule_eps)
        # Where commits follow the plan to the letter the host knows what is open; else (a drawn mask token stays open,
        # a hook changes tokens, "origin" commits by chance) it asks the device once a step.
        planned = config.alg != "origin" and self.undrawable.numel() > 0
        self._failed = torch.full_like(self.index, -1)
        self._identical = canvas.repeats > 1 and config.saves("shared_forward")
        self._trace = None if traces is None else Trace(traces)
        skipping = config.saves("idle_steps") and config.alg != "origin" and not every_step
        for step, (counts, share) in enumerate(zip(schedule.counts, schedule.shares, strict=True)):
            if not planned:
                left = canvas.masked.sum(dim=1).tolist()
                if config.schedule == "linspace":  # counted anew at each step, as published
                    counts = tuple(int(n * share) for n in left)
            # With keyed draws and Adam fresh at every step, a step that commits nothing leaves no trace at all.
            if any(counts) or not skipping:
                opened = OpenSlots.of(canvas, left)
                if len(opened):
                    self._step(step, opened, counts, share)
                left = [n - count for n, count in zip(left, counts, strict=True)]
                if canvas.tokens.device.type == "cpu":
                    self._raise_if_failed()  # nothing to wait for on a CPU: stop at once
            if on_step is not None:
                replaced = on_step(step, canvas.tokens)
                if replaced is not None and replaced is not canvas.tokens:
                    canvas.tokens.copy_(replaced)
                    canvas.masked &= canvas.response == self.model.mask_token_id
                    self._identical = planned = False
        self._raise_if_failed()
        return canvas.response

    def _step(self, step: int, opened: OpenSlots, counts: tuple[int, ...], share: float) -> None:
        """One denoising step: logits, guidance, draws, commits."""
        self.statistics.steps += 1
        config, canvas = self.config, self.canvas
        with ranges.scope(ranges.MODEL):
            phi = self._logits(opened)
        with ranges.scope(ranges.SELECT):
            ranking = self._base_ranking(phi, opened, step)
        if self._trace is not None:
            entropy = softmax_entropy(phi, backend=config.backend)[1]
        # The positions that may be committed are known before guidance: only they need its last update and a draw.
        partial = ranking is not None and self._trace is None and config.saves("committed_rows")
        guided = self._guide(phi, opened, step, defer=partial) if config.guided else None
        if partial:
            assert ranking is not None
            chosen, proposal = self._commit_ranked(phi, opened, step, counts, ranking, guided)
        else:
            drawn = self._draw(phi, opened.keys, opened.rows, step)
            with ranges.scope(ranges.SELECT):
                chosen = self._choose(phi, drawn, ranking, opened, step, counts, share)
            proposal = canvas.response.index_put((opened.rows, opened.slots), drawn)
        canvas.response.copy_(torch.where(chosen, proposal, canvas.response))
        # A mask token can only be drawn where undrawable ids are left alone; its slot then stays open, as published.
        canvas.masked &= ~chosen | (canvas.response == self.model.mask_token_id)
        self._identical = False
        if self._trace is not None:
            still_open = canvas.masked[opened.rows, opened.slots]
            best = canvas.response.masked_scatter(canvas.masked, phi.argmax(dim=-1)[still_open])
            value = self._score(self.table[best], best)
            before, after = (None, None) if guided is None else (guided.before, guided.after)
            weight = None if guided is None else guided.weight
            self._trace.add(step, canvas, opened, entropy, weight, chosen, value, before, after)

    def _logits(self, opened: OpenSlots) -> torch.Tensor:
        """phi [N, V]: the model's logits at the open slots, in memory of their own."""
        canvas, every = self.canvas, slice(None)
        flat = opened.rows * canvas.tokens.shape[1] + canvas.start + opened.slots
        if self._identical:
            # Before the first commit a prompt's K trajectories are one and the same.
            every = slice(None, None, canvas.repeats)
            flat = flat.view(len(canvas.tokens), -1)[: len(canvas.tokens) // canvas.repeats].flatten()
        masked = torch.nn.functional.pad(canvas.masked[every], (canvas.start, 0))
        given = {"positions": flat} if self._takes_positions else {}
        phi = self.model.masked_logits(canvas.tokens[every], self._attention(every), masked, **given)
        self.statistics.model_forwards += 1
        if self._identical:
            phi = phi.view(-1, len(opened) // len(canvas.tokens), phi.shape[-1])
            phi = phi.repeat_interleave(canvas.repeats, dim=0).flatten(0, 1)
        if self.undrawable.numel():
            phi.index_fill_(1, self.undrawable, -torch.inf)
        return phi

    def __post_init__(self) -> None:
        # An adapter that takes the positions need not count them on the device again.
        self._takes_positions = "positions" in inspect.signature(self.model.masked_logits).parameters

    def _attention(self, every: slice) -> torch.Tensor:
        # The very same tensor at each step: adapters keep what they derive from it.
        return self.canvas.attention if every == slice(None) else self.canvas.attention[every]

    def _base_ranking(self, phi: torch.Tensor, opened: OpenSlots, step: int) -> torch.Tensor | None:
        """[R, L] confidence before guidance, where that is what ranks the positions; phi is moved in place later."""
        config = self.config
        if config.alg != "entropy" or config.confidence != "base":
            return None
        nothing = torch.zeros(len(opened), dtype=torch.int64, device=phi.device)
        base = unmask_confidence(phi, nothing, alg="entropy", temperature=config.temperature, backend=config.backend)
        self._note_failures(step, opened.rows, base.isnan())
        return self._over_slots(base, opened)

    def _over_slots(self, column: torch.Tensor, opened: OpenSlots) -> torch.Tensor:
        """[R, L] from [N], -inf where nothing is open."""
        grid = torch.full(self.canvas.masked.shape, -torch.inf, dtype=column.dtype, device=column.device)
        grid[opened.rows, opened.slots] = column
        return grid

    def _guide(self, phi: torch.Tensor, opened: OpenSlots, step: int, defer: bool) -> _Guided:
        """Move phi in place by M Adam steps; with `defer` the last one is left to be taken for some rows only."""
        config, response_ids = self.config, self.canvas.response
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
            rows=opened.keys,
            betas=config.betas,
            eps=config.eps,
            state_dtype=config.resolved_state_dtype(),
            keep_state=config.guidance_steps > 1 or not config.saves("adam_state"),
            backend=config.backend,
        )
        embedded = self.table[response_ids]
        settled = self._settled_slots()
        where = (opened.rows, opened.slots)
        weights, values, grad = [], [], None
        for inner in range(config.guidance_steps):
            with ranges.scope(ranges.EMBED):
                blend = optimizer.embed()
            with torch.enable_grad():
                with ranges.scope(ranges.REWARD):
                    best = response_ids.index_put(where, optimizer.argmax)
                    value = self._score(embedded.index_put(where, blend.embedding), best, **settled)
                # The loss is minus the sum: a mean would change Adam's steps where gradients are near eps.
                with ranges.scope(ranges.REWARD_BACKWARD):
                    (grad,) = torch.autograd.grad(-value.sum(), blend.embedding)
            if not (defer and inner == config.guidance_steps - 1):
                with ranges.scope(ranges.UPDATE):
                    optimizer.step(grad)
            weights.append(blend.weight)
            values.append(value.detach())
            self.statistics.reward_evaluations += 1
            self.statistics.add_weight(blend.weight)
        return _Guided(weights[0], values[0], values[-1], grad if defer else None, optimizer)

    def _score(self, response: torch.Tensor, best: torch.Tensor, **settled: torch.Tensor) -> torch.Tensor:
        """Rewards [R] of response embeddings [R, L, D] whose tokens are, most likely, `best` [R, L]."""
        return self.reward.score_embeddings(self.prepared, self.index, response, self.alive(best), **settled)

    def _settled_slots(self) -> dict[str, torch.Tensor]:
        """How many leading slots of each response [R] nothing can change any more, for rewards that make use of it.

        One tensor for all inner steps of a denoising step: a reward looks at its content once.
        """
        if not getattr(self.reward, "takes_committed", False):
            return {}
        eos = (self.canvas.response == self.eos_token_id) & ~self.canvas.masked
        dead = (eos.cumsum(dim=1) - eos.long()) > 0
        return {"committed": (~self.canvas.masked | dead).long().cumprod(dim=1).sum(dim=1)}

    def alive(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, L] bool: slots that the reward model attends to. Dead: pads, and all that follows an EOS."""
        eos = tokens == self.eos_token_id
        after_eos = (eos.cumsum(dim=1) - eos.long()) > 0
        return ~(after_eos | (tokens == self.pad_token_id))

    def _draw(self, phi: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Tokens [n] from the filtered softmax of phi [n, V]; notes the trajectories whose logits are not finite."""
        config = self.config
        with ranges.scope(ranges.DRAW):
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
        self._note_failures(step, rows, drawn < 0)
        return drawn.clamp(min=0)

    def _note_failures(self, step: int, rows: torch.Tensor, bad: torch.Tensor) -> None:
        """Remember the first step in which a trajectory had logits that are not finite; no wait for the device."""
        hit = torch.zeros_like(self._failed).index_put_((rows,), bad.long(), accumulate=True) > 0
        self._failed = torch.where(hit & (self._failed < 0), step, self._failed)

    def _choose(
        self,
        phi: torch.Tensor,
        drawn: torch.Tensor,
        ranking: torch.Tensor | None,
        opened: OpenSlots,
        step: int,
        counts: tuple[int, ...],
        share: float,
    ) -> torch.Tensor:
        """[R, L] bool: the slots this step commits, every open one having been drawn."""
        config, canvas = self.config, self.canvas
        if config.alg == "origin":
            rng = make_rng(phi, config.seed, step_key(step, POSITIONS))
            return selection.independent_positions(canvas.masked, share, rng, canvas.keys)
        if ranking is None:
            confidence = unmask_confidence(
                phi,
                drawn,
                alg=config.alg,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                backend=config.backend,
            )
            ranking = self._over_slots(confidence, opened)
        if config.deprioritize_eos:
            eos = canvas.response.index_put((opened.rows, opened.slots), drawn) == self.eos_token_id
            ranking = ranking.masked_fill(eos, -torch.inf)
        return selection.best_positions(
            self._perturbed(ranking, step), canvas.masked, torch.tensor(counts, device=ranking.device)
        )

    def _perturbed(self, ranking: torch.Tensor, step: int) -> torch.Tensor:
        """The ranking [R, L] itself, or with the noise that makes it a draw of positions."""
        if not self.config.alg_temp:
            return ranking
        rng = make_rng(ranking, self.config.seed, step_key(step, POSITIONS))
        return selection.perturbed(ranking, self.config.alg_temp, rng, self.canvas.keys)

    def _commit_ranked(
        self,
        phi: torch.Tensor,
        opened: OpenSlots,
        step: int,
        counts: tuple[int, ...],
        ranking: torch.Tensor,
        guided: _Guided | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As drawing everywhere and choosing afterwards, but drawing only where the choice may fall.

        The best `counts` slots are moved and drawn; where one drew an EOS that is to be postponed, the next in line
        takes its place, until there are enough or all have been drawn; then postponed ones fill up, by position, as
        ties do.

        Returns:
            (chosen [R, L] bool, proposed tokens [R, L]).
        """
        config, canvas = self.config, self.canvas
        order = selection.ranked_slots(self._perturbed(ranking, step), canvas.masked)
        index_of_slot = opened.index_of_slot(canvas.masked)
        chosen, proposal = torch.zeros_like(canvas.masked), canvas.response.clone()
        postponed = torch.zeros_like(canvas.masked)
        needed = [min(count, n) for count, n in zip(counts, opened.counts, strict=True)]
        seen = [0] * len(needed)
        while any(needed):
            pairs = [(row, seen[row] + i) for row, count in enumerate(needed) for i in range(count)]
            rows, ranks = torch.tensor(pairs, device=order.device).T
            slots = order[rows, ranks]
            members = index_of_slot[rows, slots]
            pending = None if guided is None else guided.pending
            with ranges.scope(ranges.UPDATE):
                moved = phi[members] if pending is None else guided.optimizer.moved_rows(pending, members)  # type: ignore[union-attr]
            drawn = self._draw(moved, opened.keys[members], rows, step)
            proposal[rows, slots] = drawn
            seen = [n + count for n, count in zip(seen, needed, strict=True)]
            if not config.deprioritize_eos:
                chosen[rows, slots] = True
                break
            eos = drawn == self.eos_token_id
            chosen[rows, slots] = ~eos
            postponed[rows, slots] = eos
            missing = torch.zeros_like(self._failed).index_put_((rows,), eos.long(), accumulate=True)
            # The step's one wait for the device.
            needed = [
                min(count, n - done) for count, n, done in zip(missing.tolist(), opened.counts, seen, strict=True)
            ]
        if config.deprioritize_eos:
            short = torch.tensor(counts, device=order.device) - chosen.sum(dim=1)
            chosen |= selection.best_positions(torch.zeros_like(ranking), postponed, short)
        return chosen, proposal

    def _raise_if_failed(self) -> None:
        bad = [(step, row) for row, step in enumerate(self._failed.tolist()) if step >= 0]
        if bad:
            step, row = min(bad)
            raise NonFiniteLogitsError(step, row, f"trajectory {row} of the batch")
