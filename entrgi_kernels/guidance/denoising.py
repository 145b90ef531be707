"""The denoising loop over one batch of trajectories.

Every rule here is that of the published loop (arXiv 2602.05000 and its code), but for its known faults; the numbers of
an operator come from :mod:`entrgi_kernels.ops`, what the models compute from their adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..models import DiffusionModel
from ..models.forwards import Forwards
from ..ops import softmax_entropy
from . import phases
from .canvas import Canvas, OpenSlots, on_device
from .capture import CapturedLoop
from .commits import Commits
from .config import GuidanceConfig
from .errors import Faults
from .inner import Guided, InnerLoop
from .memory import Memory
from .results import Stats, StepTrace
from .schedules import plan
from .scoring import Scorer
from .search import Search
from .tracing import Trace

OnStep = Callable[[int, torch.Tensor], "torch.Tensor | None"]


@dataclass
class Denoiser:
    """Denoises one batch.

    Attributes:
        model: the diffusion model's adapter.
        forwards: its forwards of this canvas.
        score: the reward of the trajectories.
        table: [V, D], the reward's embeddings seen through the vocabulary map.
        config: settings.
        undrawable: int64 ids whose logits are set to -inf; empty leaves all alone.
        canvas: the trajectories; filled in place.
        stats: added to.
        memory: used again at every step; a run of several batches hands over the same.
        first: int64 [R], the column at which each row's block begins; None where the response does.
        rows: int64 [R], which of the rows of the forwards' last block these are; None for all of them.
        search: what permutes the trajectories; None where nothing does.
        settled: leading slots of every response that are final when the run begins.
        block: number of the block that the canvas's masked slots are.
        narrow: whether the forwards hold one row for each of the canvas's identical ones.
        edited: whether a hook has changed tokens.

    The host waits for the device once before the first step, once after the last, and at most once in each step: to
    learn how many of the drawn tokens are postponed, and how far the responses are settled from the left. (Traces, and
    networks that left padding disturbs, cost more.)
    """

    model: DiffusionModel
    forwards: Forwards
    score: Scorer
    table: torch.Tensor
    config: GuidanceConfig
    undrawable: torch.Tensor
    canvas: Canvas
    stats: Stats
    memory: Memory = field(default_factory=Memory)
    first: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    search: Search | None = None
    settled: int = 0
    block: int = 0

    def __post_init__(self) -> None:
        self._device = self.canvas.tokens.device
        self._faults = Faults(len(self.canvas.tokens), self._device)
        ids = self.model.mask_token_id, self.score.eos_token_id
        self._commits = Commits(self.config, self.canvas, self.undrawable, *ids, self.memory, self._faults, self._look)
        self._guide: InnerLoop | CapturedLoop | None = None
        if self.config.guided:
            copies, rows = self.config.copies, torch.arange(len(self.canvas.tokens), device=self._device)
            guided = self.score if copies == 1 else self.score.select(rows[::copies])
            self._guide = InnerLoop(guided, self.table, self.config, self.memory)
            if self.config.cuda_graphs:
                self._guide = CapturedLoop(self._guide, self.config, self.memory, len(rows) // copies)
        self._reads_are_free = self._device.type == "cpu"
        self._settled, self._begun, self.edited, self.narrow = self.settled, False, False, False
        self._fillable = self.canvas.masked.clone()

    @torch.no_grad()
    def run(
        self,
        *,
        steps: int | None = None,
        first_step: int = 0,
        traces: list[list[StepTrace]] | None = None,
        on_step: OnStep | None = None,
        every_step: bool = False,
    ) -> torch.Tensor:
        """Fill every masked slot of the canvas, in place.

        Args:
            steps: denoising steps; None is the setting's.
            first_step: number of the first one, for its draws, hooks and traces.
            traces: a list a trajectory to which every step is added; None keeps no trace.
            on_step: called after each step with (step, canvas tokens [R, S]); what it returns replaces the tokens. None
                says that it changed nothing.
            every_step: take steps that commit nothing too, for loops that look at each step's logits.

        Returns:
            [R, L] int64, the responses.

        Raises:
            NonFiniteLogitsError: NaN or infinite logits, with the first step and the trajectory.
            NonFiniteRewardError: likewise of the reward, or its gradient.
            RuntimeError: slots are still masked after the last step.
        """
        config, canvas = self.config, self.canvas
        left = canvas.masked.sum(dim=1).tolist()
        schedule = plan(config.schedule, left, steps or config.steps, config.schedule_eps)
        planned_counts = torch.tensor(schedule.counts, dtype=torch.int64, device=self._device)
        # Where commits follow the plan to the letter the host knows what is open; else (a drawn mask token stays open,
        # a hook changes tokens, "origin" commits by chance, a threshold by confidence, a search permutes) it asks the
        # device once a step.
        self._planned = config.alg != "origin" and config.threshold is None and self.undrawable.numel() > 0
        self._planned &= self.search is None
        if self.search is not None:
            self._commits.log_probs = self.search.log_probs
        self._identical = canvas.repeats > 1 and config.saves("shared_forward")
        self._open()
        self._trace = None if traces is None else Trace(traces)
        last_step = first_step + len(schedule) - 1
        self._planned_as = list(range(len(canvas.tokens)))
        skipping = config.saves("idle_steps") and config.alg != "origin" and not every_step
        for step, planned in enumerate(zip(schedule.counts, schedule.shares, strict=True), first_step):
            counts = tuple(planned[0][row] for row in self._planned_as)
            shares = tuple(planned[1][row] for row in self._planned_as)
            wanted = planned_counts[step - first_step]
            if not self._planned:
                left = self._look(canvas.masked.sum(dim=1), True, canvas.masked)
                # Counted anew at each step, as published. "even" keeps its plan until the last step fills what is left.
                kept = zip(left, counts, shares, strict=True)
                anew = config.schedule == "linspace"
                counts = tuple([int(n * share) if anew or share == 1.0 else count for n, count, share in kept])
                if config.threshold is not None:
                    counts = tuple(min(n, max(1, count)) for n, count in zip(left, counts, strict=True))
                wanted = on_device(counts, self._device)
            # With keyed draws and Adam fresh at every step, a step that commits nothing leaves no trace at all.
            if any(counts) or not skipping:
                opened = OpenSlots.of(canvas.masked, canvas.keys, left)
                if len(opened):
                    self._step(step, opened, counts, wanted, shares)
                left = [n - count for n, count in zip(left, counts, strict=True)]
                if self._reads_are_free:
                    self._faults.check()  # at once, not at the end
            if on_step is not None:
                replaced = on_step(step, canvas.tokens)
                if replaced is not None:  # perhaps the same tensor, changed in place
                    if replaced is not canvas.tokens:
                        canvas.tokens.copy_(replaced)
                    # What the hook masks is filled again. After the last step it is the hook's own.
                    if step < last_step:
                        canvas.masked.copy_((canvas.response == self.model.mask_token_id) & self._fillable)
                    self._identical = self._planned = False
                    self.edited, self._settled = True, 0
        (unfilled,) = self._faults.check(canvas.masked.sum(dim=1))
        for place, count in enumerate(unfilled):
            if count:  # a mask token is never returned as text
                raise RuntimeError(
                    f"{count} slots of trajectory {place} are still masked after the last step: expected none"
                )
        return canvas.response

    def _step(
        self,
        step: int,
        opened: OpenSlots,
        counts: tuple[int, ...],
        wanted: torch.Tensor,
        shares: tuple[float, ...],
    ) -> None:
        """One denoising step: logits, guidance, draws, commits. `counts` and `wanted` [R] say the same."""
        self.stats.steps += 1
        config, canvas = self.config, self.canvas
        with phases.scope(phases.MODEL):
            phi = self._logits(opened)
        if self.search is not None:
            phi, opened, ancestors = self._searched(self.search, phi, opened, step, counts)
            if ancestors is not None:
                counts, shares = tuple(counts[one] for one in ancestors), tuple(shares[one] for one in ancestors)
                wanted = wanted[on_device(ancestors, self._device)]
        self.stats.add_work(self.block, len(canvas.tokens), len(opened), not self._begun)
        self._begun = True
        ranking = self._commits.base_ranking(phi, opened, step)
        if self._trace is not None:
            entropy = softmax_entropy(phi, backend=config.backend)[1]
        # The slots that may be committed are known before guidance: only they need its last update and a draw.
        partial = ranking is not None and self._trace is None and config.saves("committed_rows")
        partial &= self._planned or self._reads_are_free  # it may take a look, and a step has one
        partial &= self.search is None or not config.self_rewarding  # which reads all drawn tokens' probabilities
        guided: Guided | None = None
        move: Callable[[torch.Tensor], torch.Tensor] = functools.partial(self.memory.rows, "moved phi", phi)
        if self._guide is not None:
            guided, move = self._guided(self._guide, phi, opened, step, partial)
        if partial:
            assert ranking is not None
            self._commits.commit_ranked(move, opened, step, counts, wanted, shares, ranking)
        else:
            chosen = self._commits.commit_any(phi, opened, step, wanted, shares, ranking)
        self._identical = False
        if self._planned and not partial:
            self._look(wanted, False, canvas.masked)
        if self._trace is not None:
            still_open = canvas.masked[opened.rows, opened.slots]
            best = canvas.response.masked_scatter(canvas.masked, phi.argmax(dim=-1)[still_open])
            best = canvas.read_by_reward(best, self.score.pad_token_id)
            value = self.score(self.table[best], best)
            before, after, weight = None, None, None
            if guided is not None:
                before, after = (value.repeat_interleave(config.copies) for value in (guided.before, guided.after))
                weight = guided.weights[0]
                if config.copies > 1:
                    weight = weight[opened.leaders(config.copies)[1]]
            self._trace.add(step, canvas, opened, entropy, weight, chosen, value, before, after)

    def _guided(
        self, guide: InnerLoop | CapturedLoop, phi: torch.Tensor, opened: OpenSlots, step: int, partial: bool
    ) -> tuple[Guided, Callable[[torch.Tensor], torch.Tensor]]:
        """Move phi; of a trajectory's candidates, which are one and the same until they are drawn, one row is guided.

        Returns:
            (what guidance leaves behind, what gives the guided logits of some rows of phi).
        """
        canvas, copies = self.canvas, self.config.copies
        shown = canvas.read_by_reward(canvas.response, self.score.pad_token_id)
        moved, slots, source = phi, opened, None
        if copies > 1:
            leaders, source = opened.leaders(copies)
            rows = opened.rows[leaders] // copies
            slots = OpenSlots(rows, opened.slots[leaders], opened.keys[leaders], opened.counts[::copies])
            shown, moved = shown[::copies], phi[leaders]
        settled = self._settled if self.score.takes_committed else None
        guided = guide(moved, slots, shown, step, settled, partial)
        self.stats.reward_evaluations += self.config.inner_steps
        self.stats.add_weights(guided.weights)
        self._faults.note_logits(step, slots.rows * copies, guided.unreadable)
        hit, rewards = guided.faults(slots.rows)
        self._faults.note_rewards(step, hit.repeat_interleave(copies), rewards.repeat_interleave(copies))
        if source is None:
            return guided, guided.finish
        torch.index_select(moved, 0, source, out=phi)
        return guided, lambda rows: guided.finish(source[rows])

    def _searched(
        self, search: Search, phi: torch.Tensor, opened: OpenSlots, step: int, counts: tuple[int, ...]
    ) -> tuple[torch.Tensor, OpenSlots, list[int] | None]:
        """The search chooses which trajectories go on.

        Returns:
            (the step's logits, its slots, which trajectory each one is a copy of: None where all stay).
        """
        canvas = self.canvas
        # "origin" commits by chance: any open slot.
        commits = opened.counts if self.config.alg == "origin" else list(map(min, counts, opened.counts))
        groups = search.working(step, commits)
        if not groups:
            return phi, opened, None
        best = canvas.response.index_put((opened.rows, opened.slots), phi.argmax(dim=-1))
        best = canvas.read_by_reward(best, self.score.pad_token_id)
        evaluations = search.evaluations
        ancestors = search.select(step, best, groups)
        self.stats.search_evaluations += search.evaluations - evaluations
        self._commits.log_probs = search.log_probs
        if ancestors is None:
            return phi, opened, None
        index = on_device(ancestors, self._device)
        search.permute(index)
        if self.config.copies == 1:  # candidates are guided before they part: what is kept of them is theirs in common
            self.score.permute(index)
        self._fillable = self._fillable[index]
        # One that had ended goes on by the plan of the one that it is a copy of.
        self._planned_as = [self._planned_as[one] for one in ancestors]
        if self._trace is not None:
            old = [list(trace) for trace in self._trace.trajectories]
            for trace, one in zip(self._trace.trajectories, ancestors, strict=True):
                trace[:] = old[one]
        first = torch.full_like(canvas.tokens[:, 0], canvas.start) if self.first is None else self.first
        self.forwards.open(canvas.tokens, first, index)
        opened, source = opened.permuted(ancestors, canvas.keys)
        kept = self.memory.take("permuted phi", (len(opened), phi.shape[1]), phi.dtype, phi.device)
        torch.index_select(phi, 0, source, out=kept)
        return kept, opened, ancestors

    def _look(self, column: torch.Tensor, wanted: bool, open_slots: torch.Tensor) -> list[int]:
        """Int64 [n] as a list, and with the same transfer how far the responses are settled: a step's one wait.

        Args:
            wanted: whether the column itself is; an empty list otherwise, and no wait where nothing is.
            open_slots: [R, L], slots that may still change.
        """
        # Where a hook may change what is committed nothing is settled: the reward would keep what was there before.
        counted = self._guide is not None and self.score.takes_committed and not self.edited
        parts = [column] if wanted else []
        if counted:
            shown = (self.canvas.read_by_reward(self.canvas.response, 0), self.canvas.read_by_reward(open_slots, True))
            parts.append(self.score.settled(*shown))
        values = torch.cat(parts).tolist() if parts else []
        if counted:
            self._settled = values.pop()
        return values

    def _logits(self, opened: OpenSlots) -> torch.Tensor:
        """phi [N, V]: the model's logits at the open slots, in memory of the loop's own."""
        canvas = self.canvas
        if self.narrow and not self._identical:
            self._open()
        size = (len(opened), self.model.vocab_size)
        kept = size[0] if self._guide is None else self._guide.padded(size[0])
        phi = self.memory.take("phi", (kept, size[1]), self.model.dtype, self._device)[: size[0]]
        rows, slots = opened.rows, opened.slots
        tokens, masked = canvas.tokens, torch.nn.functional.pad(canvas.masked, (canvas.start, 0))
        self.stats.model_forwards += 1
        if self._identical:
            # Before the first commit a prompt's K trajectories are one and the same.
            leaders, source = opened.leaders(canvas.repeats)
            rows, slots = rows[leaders] // canvas.repeats, slots[leaders]
            tokens, masked = tokens[:: canvas.repeats], masked[:: canvas.repeats]
        flat = rows * tokens.shape[1] + canvas.start + slots
        if self._identical:
            logits = self.forwards.masked_logits(tokens, masked, positions=flat)
            phi = torch.index_select(logits, 0, source, out=phi)
        else:
            phi = self.forwards.masked_logits(tokens, masked, positions=flat, out=phi)
        if self.undrawable.numel():
            phi.index_fill_(1, self.undrawable, -torch.inf)
        return phi

    def _open(self) -> None:
        """Open the block; of trajectories that are one and the same one row is enough."""
        tokens, count, k = self.canvas.tokens, len(self.canvas.tokens), self.canvas.repeats
        first = torch.full_like(tokens[:, 0], self.canvas.start) if self.first is None else self.first
        if self._identical:
            self.forwards.open(tokens[::k], first[::k], torch.arange(0, count, k, device=self._device))
        elif self.narrow:
            rows = torch.arange(count // k, device=self._device).repeat_interleave(k, output_size=count)
            self.forwards.open(tokens, first, rows)
        else:
            self.forwards.open(tokens, first, self.rows)
        self.narrow = self._identical
