"""The denoising loop: guided logits, draws and commits over one batch of trajectories.

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
from ..ops import make_rng, sample_tokens, softmax_entropy, unmask_confidence
from ..rewards import PreparedPrompts, Reward
from . import ranges, selection
from .buffers import Buffers
from .canvas import Canvas, NonFiniteLogitsError, NonFiniteRewardError, OpenSlots, Statistics
from .capture import CapturedLoop
from .config import GuidanceConfig
from .inner import Guided, InnerLoop, Scorer
from .keys import FINAL_DRAW, POSITIONS, step_key
from .results import StepTrace
from .schedules import plan
from .tracing import Trace

OnStep = Callable[[int, torch.Tensor], "torch.Tensor | None"]


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
        buffers: memory that is used again at every step; a run of several batches hands over the same.
        tokenizer: of the diffusion model, for rewards that look at tokens (``takes_targets``).

    The host waits for the device once before the first step, once after the last, and at most once in each step: to
    learn how many of the drawn tokens are postponed, and how far the responses are settled from the left. (Traces, and
    networks that left padding disturbs, cost more.)
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
    buffers: Buffers = field(default_factory=Buffers)
    tokenizer: Any = None

    def __post_init__(self) -> None:
        # An adapter that takes the positions need not count them on the device again.
        taken = inspect.signature(self.model.masked_logits).parameters
        self._takes_positions, self._takes_out = "positions" in taken, "out" in taken
        self._score = Scorer(
            self.reward,
            self.prepared,
            self.index,
            self.eos_token_id,
            self.pad_token_id,
            self.config,
            self.tokenizer,
            self.table.shape[0],
        )
        self._guide: InnerLoop | CapturedLoop | None = None
        if self.config.guided:
            self._guide = InnerLoop(self._score, self.table, self.config, self.buffers)
            if self.config.cuda_graphs:
                self._guide = self.captured(self._guide)
        # Where looking costs nothing the loop looks more often and draws less.
        self._reads_are_free = self.canvas.tokens.device.type == "cpu"
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
        planned_counts = torch.tensor(schedule.counts, dtype=torch.int64, device=self.index.device)
        # Where commits follow the plan to the letter the host knows what is open; else (a drawn mask token stays open,
        # a hook changes tokens, "origin" commits by chance) it asks the device once a step.
        self._planned = config.alg != "origin" and self.undrawable.numel() > 0
        # The step in which a trajectory's logits, or its reward, first were not finite: one of the two, or -1.
        self._failed, self._faulty = torch.full_like(self.index, -1), torch.full_like(self.index, -1)
        self._faulty_rewards = torch.zeros(self.index.shape, device=self.index.device)
        self._last_step = len(schedule) - 1
        self._identical = canvas.repeats > 1 and config.saves("shared_forward")
        self._trace = None if traces is None else Trace(traces)
        skipping = config.saves("idle_steps") and config.alg != "origin" and not every_step
        for step, (counts, share) in enumerate(zip(schedule.counts, schedule.shares, strict=True)):
            wanted = planned_counts[step]
            if not self._planned:
                left = self._read(canvas.masked.sum(dim=1), look=True)
                # Counted anew at each step, as published. "even" keeps its plan until the last step fills what is left.
                if config.schedule == "linspace" or step == self._last_step:
                    counts = tuple(int(n * share) for n in left)
                    wanted = self._to_device(counts)
            # With keyed draws and Adam fresh at every step, a step that commits nothing leaves no trace at all.
            if any(counts) or not skipping:
                opened = OpenSlots.of(canvas, left)
                if len(opened):
                    self._step(step, opened, counts, wanted, share)
                left = [n - count for n, count in zip(left, counts, strict=True)]
                if self._reads_are_free:
                    self._raise_if_failed()  # at once, not at the end
            if on_step is not None:
                replaced = on_step(step, canvas.tokens)
                if replaced is not None:  # perhaps the same tensor, changed in place
                    if replaced is not canvas.tokens:
                        canvas.tokens.copy_(replaced)
                    # What the hook masks is filled again. After the last step it is the hook's own.
                    if step < self._last_step:
                        canvas.masked.copy_(canvas.response == self.model.mask_token_id)
                    self._identical = self._planned = False
                    self._edited, self._settled = True, 0
        self._raise_if_failed(ended=True)
        return canvas.response

    def _read(self, column: torch.Tensor, look: bool, open_slots: torch.Tensor | None = None) -> list[int]:
        """Int64 [n] as a list, and with the same transfer how far the responses are settled: a step's one wait.

        Args:
            look: whether the column itself is wanted; an empty list otherwise, and no wait where nothing is.
            open_slots: [R, L], slots that may still change; None takes those that are masked.
        """
        # Where a hook may change what is committed nothing is settled: the reward would keep what was there before.
        counted = self.config.guided and self._score.takes_committed and not self._edited
        parts = [column] if look else []
        if counted:
            open_slots = self.canvas.masked if open_slots is None else open_slots
            parts.append(self._score.settled(self.canvas.response, open_slots))
        values = torch.cat(parts).tolist() if parts else []
        if counted:
            self._settled = values.pop()
        return values

    def _to_device(self, numbers: tuple[int, ...]) -> torch.Tensor:
        """Int64 tensor of some numbers; from pinned memory, since a copy from any other is waited for."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        if self.index.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.index.device, non_blocking=True)

    def captured(self, loop: InnerLoop) -> CapturedLoop:
        """The inner loop replayed from CUDA graphs.

        Raises:
            ValueError: not on a CUDA device, or a reward that looks at tokens, which padded rows have no place among.
        """
        device = self.canvas.tokens.device
        if getattr(self.reward, "takes_targets", False):
            raise ValueError(f"cuda_graphs=True: not for {type(self.reward).__name__}, which looks at tokens")
        if device.type != "cuda":
            raise ValueError(f"cuda_graphs=True: expected models on a CUDA device, they are on {device}")
        return CapturedLoop(loop, self.config, self.buffers, len(self.canvas.tokens))

    def _step(self, step: int, opened: OpenSlots, counts: tuple[int, ...], wanted: torch.Tensor, share: float) -> None:
        """One denoising step: logits, guidance, draws, commits. `counts` and `wanted` [R] say the same."""
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
        partial &= self._planned or self._reads_are_free  # it may take a look, and a step has one
        guided = None
        if self._guide is not None:
            settled = self._settled if self._score.takes_committed else None
            guided = self._guide(phi, opened, canvas, step, settled, partial)
            self.statistics.reward_evaluations += self._guide.length
            self.statistics.add_weights(guided.weights)
            self._note_faults(step, opened.rows, guided)
        if partial:
            assert ranking is not None
            chosen, proposal = self._commit_ranked(phi, opened, step, counts, wanted, ranking, guided)
        else:
            drawn = self._draw(phi, opened.keys, opened.rows, step)
            with ranges.scope(ranges.SELECT):
                chosen = self._choose(phi, drawn, ranking, opened, step, wanted, share)
                proposal = canvas.response.index_put((opened.rows, opened.slots), drawn)
        canvas.response.copy_(torch.where(chosen, proposal, canvas.response))
        # A mask token can only be drawn where undrawable ids are left alone, and not at the last step; its slot then
        # stays open, as published.
        canvas.masked &= ~chosen | (canvas.response == self.model.mask_token_id)
        self._identical = False
        if self._planned and not partial:
            self._read(wanted, look=False)
        if self._trace is not None:
            still_open = canvas.masked[opened.rows, opened.slots]
            best = canvas.response.masked_scatter(canvas.masked, phi.argmax(dim=-1)[still_open])
            value = self._score(self.table[best], best)
            before, after = (None, None) if guided is None else (guided.before, guided.after)
            weight = None if guided is None else guided.weights[0]
            self._trace.add(step, canvas, opened, entropy, weight, chosen, value, before, after)

    def _logits(self, opened: OpenSlots) -> torch.Tensor:
        """phi [N, V]: the model's logits at the open slots, in memory of the loop's own."""
        canvas, every, count = self.canvas, slice(None), len(self.canvas.tokens)
        device, size = canvas.tokens.device, (len(opened), self.model.vocab_size)
        kept = self._guide.padded(size[0]) if isinstance(self._guide, CapturedLoop) else size[0]
        phi = self.buffers.take("phi", (kept, size[1]), self.model.dtype, device)[: size[0]]
        flat = opened.rows * canvas.tokens.shape[1] + canvas.start + opened.slots
        if self._identical:
            # Before the first commit a prompt's K trajectories are one and the same.
            every = slice(None, None, canvas.repeats)
            flat = flat.view(count, -1)[: count // canvas.repeats].flatten()
        masked = torch.nn.functional.pad(canvas.masked[every], (canvas.start, 0))
        given = {"positions": flat} if self._takes_positions else {}
        if self._takes_out and not self._identical:
            given["out"] = phi
        logits = self.model.masked_logits(canvas.tokens[every], self._attention(every), masked, **given)
        self.statistics.model_forwards += 1
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

    def _draw(self, phi: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Tokens [n] from the filtered softmax of phi [n, V]; notes the trajectories whose logits are not finite."""
        config, mask = self.config, self.model.mask_token_id
        if step == self._last_step and not self.undrawable.numel():
            phi[:, mask : mask + 1] = -torch.inf  # drawn now, a mask token would be returned as text
        with ranges.scope(ranges.DRAW):
            drawn = sample_tokens(
                phi,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=config.seed,
                counter=step_key(step, FINAL_DRAW),
                keys=keys,
                backend=config.backend,
            )
        self._note_failures(step, rows, drawn < 0)
        return drawn.clamp(min=0)

    def _note_failures(self, step: int, rows: torch.Tensor, bad: torch.Tensor) -> None:
        """Remember the first step in which a trajectory had logits that are not finite; no wait for the device."""
        hit = torch.zeros_like(self._failed).index_put_((rows,), bad.long(), accumulate=True) > 0
        self._failed = torch.where(hit & (self._failed < 0) & (self._faulty < 0), step, self._failed)

    def _note_faults(self, step: int, rows: torch.Tensor, guided: Guided) -> None:
        """As for logits, of rewards and their gradients: what they spoil is not the diffusion model's doing."""
        self._note_failures(step, rows, guided.unreadable)
        hit, rewards = guided.faults(rows)
        hit &= (self._failed < 0) & (self._faulty < 0)
        self._faulty = torch.where(hit, step, self._faulty)
        self._faulty_rewards = torch.where(hit, rewards, self._faulty_rewards)

    def _choose(
        self,
        phi: torch.Tensor,
        drawn: torch.Tensor,
        ranking: torch.Tensor | None,
        opened: OpenSlots,
        step: int,
        wanted: torch.Tensor,
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
        return selection.best_positions(self._perturbed(ranking, step), canvas.masked, wanted)

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
        wanted: torch.Tensor,
        ranking: torch.Tensor,
        guided: Guided | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As drawing everywhere and choosing afterwards, but drawing only where the choice may fall.

        The best slots, as many as are wanted, are moved and drawn. Where some drew an EOS that is to be postponed the
        next in line are drawn: as many as are missing, again and again, where the host may look at results for
        nothing; elsewhere, after its one look, all that the trajectory has left. Then the best of what was drawn are
        chosen, postponed ones last and by position, as ties are.

        Returns:
            (chosen [R, L] bool, proposed tokens [R, L]).
        """
        config, canvas = self.config, self.canvas
        ranking = self._perturbed(ranking, step)
        with ranges.scope(ranges.SELECT):
            order = selection.ranked_slots(ranking, canvas.masked)
            index_of_slot = opened.index_of_slot(canvas.masked)
            tried, postponed = torch.zeros_like(canvas.masked), torch.zeros_like(canvas.masked)
            proposal = canvas.response.clone()
        seen, again = [0] * len(counts), False
        needed, needed_there = [min(count, n) for count, n in zip(counts, opened.counts, strict=True)], wanted
        while any(needed):
            with ranges.scope(ranges.SELECT):
                first = self._to_device(tuple(seen)) if again else torch.zeros_like(wanted)
                rows, ranks = _runs(first, needed_there, sum(needed))
                slots = order[rows, ranks]
                members = index_of_slot[rows, slots]
            with ranges.scope(ranges.UPDATE):
                if guided is None or guided.pending is None:
                    moved = self.buffers.rows("moved phi", phi, members)
                else:
                    moved = guided.optimizer.moved_rows(guided.pending, members)
            drawn = self._draw(moved, opened.keys[members], rows, step)
            with ranges.scope(ranges.SELECT):
                proposal[rows, slots] = drawn
                tried[rows, slots] = torch.ones_like(rows, dtype=torch.bool)
                eos = (drawn == self.eos_token_id) & config.deprioritize_eos
                postponed[rows, slots] = eos
                seen = [n + count for n, count in zip(seen, needed, strict=True)]
                left = [n - done for n, done in zip(opened.counts, seen, strict=True)]
                if again and not self._reads_are_free:
                    break  # all was drawn where anything was missing
                again = True
                missing = torch.zeros_like(wanted).index_put_((rows,), eos.long(), accumulate=True)
                # What was drawn and is not postponed is among the best: it will be committed whatever follows.
                unsure = canvas.masked & ~(tried & ~postponed)
                counted = self._read(missing, look=config.deprioritize_eos, open_slots=unsure) or [0] * len(seen)
                if self._reads_are_free:
                    needed = [min(count, n) for count, n in zip(counted, left, strict=True)]
                else:
                    needed = [n if count else 0 for count, n in zip(counted, left, strict=True)]
                needed_there = self._to_device(tuple(needed)) if any(needed) else missing
        with ranges.scope(ranges.SELECT):
            ranking = ranking.masked_fill(postponed, -torch.inf)
            return selection.best_positions(ranking, tried, wanted), proposal

    def _raise_if_failed(self, ended: bool = False) -> None:
        columns = [self._failed, self._faulty, *([self.canvas.masked.sum(dim=1)] if ended else ())]
        rows = torch.stack(columns).T.tolist()
        bad = [(max(row[:2]), place, row[1] >= 0) for place, row in enumerate(rows) if max(row[:2]) >= 0]
        if bad:
            step, row, faulty = min(bad)
            where = f"trajectory {row} of the batch"
            if faulty:
                raise NonFiniteRewardError(step, row, where, self._faulty_rewards[row].item())
            raise NonFiniteLogitsError(step, row, where)
        for place, (*_, left) in enumerate(rows if ended else ()):
            if left:  # a mask token is never returned as text
                raise RuntimeError(
                    f"{left} slots of trajectory {place} are still masked after the last step: expected none"
                )


def _runs(first: torch.Tensor, lengths: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, place) of every entry of runs first[r], first[r] + 1, ... of given lengths, one run a row.

    Args:
        first, lengths: int64 [R].
        total: the sum of the lengths; telling it spares a wait for the device.
    """
    rows = torch.arange(len(lengths), device=lengths.device)
    rows = rows.repeat_interleave(lengths, output_size=total)
    begin = lengths.cumsum(dim=0) - lengths - first
    return rows, torch.arange(total, device=lengths.device) - begin[rows]
