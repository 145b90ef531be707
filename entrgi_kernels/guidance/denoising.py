"""The denoising loop over one batch of trajectories.

Every rule here is that of the published loop (arXiv 2602.05000 and its code), but for its known faults; the numbers of
an operator come from :mod:`entrgi_kernels.ops`, what the models compute from their adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models import DiffusionModel
from ..ops import softmax_entropy
from . import phases
from .canvas import Canvas, OpenSlots
from .capture import CapturedLoop
from .commits import Commits, on_device
from .config import GuidanceConfig
from .errors import Faults
from .inner import InnerLoop
from .memory import Memory
from .results import Stats, StepTrace
from .schedules import plan
from .scoring import Scorer
from .tracing import Trace

OnStep = Callable[[int, torch.Tensor], "torch.Tensor | None"]


@dataclass
class Denoiser:
    """Denoises one batch.

    Attributes:
        model: the diffusion model's adapter.
        score: the reward of the trajectories.
        table: [V, D], the reward's embeddings seen through the vocabulary map.
        config: settings.
        undrawable: int64 ids whose logits are set to -inf; empty leaves all alone.
        canvas: the trajectories; filled in place.
        stats: added to.
        memory: used again at every step; a run of several batches hands over the same.

    The host waits for the device once before the first step, once after the last, and at most once in each step: to
    learn how many of the drawn tokens are postponed, and how far the responses are settled from the left. (Traces, and
    networks that left padding disturbs, cost more.)
    """

    model: DiffusionModel
    score: Scorer
    table: torch.Tensor
    config: GuidanceConfig
    undrawable: torch.Tensor
    canvas: Canvas
    stats: Stats
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        # An adapter that takes the positions need not count them on the device again.
        taken = inspect.signature(self.model.masked_logits).parameters
        self._takes_positions, self._takes_out = "positions" in taken, "out" in taken
        self._device = self.canvas.tokens.device
        self._faults = Faults(len(self.canvas.tokens), self._device)
        ids = self.model.mask_token_id, self.score.eos_token_id
        self._commits = Commits(self.config, self.canvas, self.undrawable, *ids, self.memory, self._faults, self._look)
        self._guide: InnerLoop | CapturedLoop | None = None
        if self.config.guided:
            self._guide = InnerLoop(self.score, self.table, self.config, self.memory)
            if self.config.cuda_graphs:
                self._guide = CapturedLoop(self._guide, self.config, self.memory, len(self.canvas.tokens))
        self._reads_are_free = self._device.type == "cpu"
        self._settled, self._edited = 0, False
        self._shared_attention: torch.Tensor | None = None

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
        schedule = plan(config.schedule, left, config.steps, config.schedule_eps)
        planned_counts = torch.tensor(schedule.counts, dtype=torch.int64, device=self._device)
        # Where commits follow the plan to the letter the host knows what is open; else (a drawn mask token stays open,
        # a hook changes tokens, "origin" commits by chance) it asks the device once a step.
        self._planned = config.alg != "origin" and self.undrawable.numel() > 0
        self._identical = canvas.repeats > 1 and config.saves("shared_forward")
        self._trace = None if traces is None else Trace(traces)
        last_step = len(schedule) - 1
        skipping = config.saves("idle_steps") and config.alg != "origin" and not every_step
        for step, (counts, share) in enumerate(zip(schedule.counts, schedule.shares, strict=True)):
            wanted = planned_counts[step]
            if not self._planned:
                left = self._look(canvas.masked.sum(dim=1), True, canvas.masked)
                # Counted anew at each step, as published. "even" keeps its plan until the last step fills what is left.
                if config.schedule == "linspace" or step == last_step:
                    counts = tuple(int(n * share) for n in left)
                    wanted = on_device(counts, self._device)
            # With keyed draws and Adam fresh at every step, a step that commits nothing leaves no trace at all.
            if any(counts) or not skipping:
                opened = OpenSlots.of(canvas.masked, canvas.keys, left)
                if len(opened):
                    self._step(step, opened, counts, wanted, share, step == last_step)
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
                        canvas.masked.copy_(canvas.response == self.model.mask_token_id)
                    self._identical = self._planned = False
                    self._edited, self._settled = True, 0
        (unfilled,) = self._faults.check(canvas.masked.sum(dim=1))
        for place, count in enumerate(unfilled):
            if count:  # a mask token is never returned as text
                raise RuntimeError(
                    f"{count} slots of trajectory {place} are still masked after the last step: expected none"
                )
        return canvas.response

    def _step(
        self, step: int, opened: OpenSlots, counts: tuple[int, ...], wanted: torch.Tensor, share: float, last: bool
    ) -> None:
        """One denoising step: logits, guidance, draws, commits. `counts` and `wanted` [R] say the same."""
        self.stats.steps += 1
        config, canvas = self.config, self.canvas
        with phases.scope(phases.MODEL):
            phi = self._logits(opened)
        ranking = self._commits.base_ranking(phi, opened, step)
        if self._trace is not None:
            entropy = softmax_entropy(phi, backend=config.backend)[1]
        # The slots that may be committed are known before guidance: only they need its last update and a draw.
        partial = ranking is not None and self._trace is None and config.saves("committed_rows")
        partial &= self._planned or self._reads_are_free  # it may take a look, and a step has one
        guided = None
        if self._guide is not None:
            settled = self._settled if self.score.takes_committed else None
            guided = self._guide(phi, opened, canvas.response, step, settled, partial)
            self.stats.reward_evaluations += config.guidance_steps
            self.stats.add_weights(guided.weights)
            self._faults.note_logits(step, opened.rows, guided.unreadable)
            self._faults.note_rewards(step, *guided.faults(opened.rows))
        if partial:
            assert ranking is not None
            move = (lambda rows: self.memory.rows("moved phi", phi, rows)) if guided is None else guided.finish
            self._commits.commit_ranked(move, opened, step, counts, wanted, ranking, last)
        else:
            chosen = self._commits.commit_any(phi, opened, step, wanted, share, ranking, last)
        self._identical = False
        if self._planned and not partial:
            self._look(wanted, False, canvas.masked)
        if self._trace is not None:
            still_open = canvas.masked[opened.rows, opened.slots]
            best = canvas.response.masked_scatter(canvas.masked, phi.argmax(dim=-1)[still_open])
            value = self.score(self.table[best], best)
            before, after = (None, None) if guided is None else (guided.before, guided.after)
            weight = None if guided is None else guided.weights[0]
            self._trace.add(step, canvas, opened, entropy, weight, chosen, value, before, after)

    def _look(self, column: torch.Tensor, wanted: bool, open_slots: torch.Tensor) -> list[int]:
        """Int64 [n] as a list, and with the same transfer how far the responses are settled: a step's one wait.

        Args:
            wanted: whether the column itself is; an empty list otherwise, and no wait where nothing is.
            open_slots: [R, L], slots that may still change.
        """
        # Where a hook may change what is committed nothing is settled: the reward would keep what was there before.
        counted = self._guide is not None and self.score.takes_committed and not self._edited
        parts = [column] if wanted else []
        if counted:
            parts.append(self.score.settled(self.canvas.response, open_slots))
        values = torch.cat(parts).tolist() if parts else []
        if counted:
            self._settled = values.pop()
        return values

    def _logits(self, opened: OpenSlots) -> torch.Tensor:
        """phi [N, V]: the model's logits at the open slots, in memory of the loop's own."""
        canvas, every, count = self.canvas, slice(None), len(self.canvas.tokens)
        size = (len(opened), self.model.vocab_size)
        kept = size[0] if self._guide is None else self._guide.padded(size[0])
        phi = self.memory.take("phi", (kept, size[1]), self.model.dtype, self._device)[: size[0]]
        flat = opened.rows * canvas.tokens.shape[1] + canvas.start + opened.slots
        if self._identical:
            # Before the first commit a prompt's K trajectories are one and the same.
            every = slice(None, None, canvas.repeats)
            flat = flat.view(count, -1)[: count // canvas.repeats].flatten()
        masked = torch.nn.functional.pad(canvas.masked[every], (canvas.start, 0))
        given: dict[str, Any] = {"positions": flat} if self._takes_positions else {}
        if self._takes_out and not self._identical:
            given["out"] = phi
        logits = self.model.masked_logits(canvas.tokens[every], self._attention(every), masked, **given)
        self.stats.model_forwards += 1
        if self._identical:
            per_row = len(opened) // count
            phi = phi.view(-1, canvas.repeats, per_row, size[1])
            phi = phi.copy_(logits.view(-1, 1, per_row, size[1])).view(size)
        else:
            phi = logits
        if self.undrawable.numel():
            phi.index_fill_(1, self.undrawable, -torch.inf)
        return phi

    def _attention(self, every: slice) -> torch.Tensor:
        # The very same tensor at each step: adapters keep what they derive from it.
        if every == slice(None):
            return self.canvas.attention
        if self._shared_attention is None:
            self._shared_attention = self.canvas.attention[every]
        return self._shared_attention
