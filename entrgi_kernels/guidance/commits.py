"""Which slots a denoising step fills, and with what."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..backends import philox
from ..ops import make_rng, sample_tokens, unmask_confidence
from . import phases
from .canvas import Canvas, OpenSlots, on_device
from .config import GuidanceConfig
from .errors import Faults
from .keys import FINAL_DRAW, POSITIONS, draw_counter
from .memory import Memory

# (numbers [R], whether they are wanted, slots [R, L] that may still change) -> the numbers.
Look = Callable[[torch.Tensor, bool, torch.Tensor], list[int]]


def ranked_slots(confidence: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Slots [R, L] of each trajectory in the order in which they would be committed; unmasked ones last.

    Args:
        confidence: [R, L]; -inf (a postponed token) and NaN come last among the masked positions, ties by position.
        masked: [R, L] bool.
    """
    lowest = torch.finfo(confidence.dtype).min
    score = confidence.nan_to_num(nan=lowest, posinf=torch.finfo(confidence.dtype).max, neginf=lowest)
    return score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def best_positions(confidence: torch.Tensor, masked: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts` most confident masked positions of each trajectory.

    Args:
        confidence, masked: as in :func:`ranked_slots`; no unmasked position is ever chosen.
        counts: [R] int64.

    Returns:
        [R, L] bool, the chosen positions.
    """
    order = ranked_slots(confidence, masked)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return masked & (rank < counts[:, None])


def perturbed(confidence: torch.Tensor, alg_temp: float, rng: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Confidence whose best positions are a draw without replacement from softmax(confidence / alg_temp).

    Gumbel noise makes it that draw. Postponed tokens (-inf) stay last.

    Args:
        confidence: [R, L].
        alg_temp: > 0.
        rng: int64 [2] (seed, step).
        keys: int64 [R, L] row keys.
    """
    noise = philox.exponential(rng, keys, torch.zeros_like(keys), confidence.dtype).log()
    return confidence / alg_temp - noise


def independent_positions(
    masked: torch.Tensor, shares: torch.Tensor, rng: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Each masked position with its trajectory's probability (alg "origin").

    Args:
        masked: [R, L] bool.
        shares: float64 [R], the probabilities, 1 at the last step.
        rng: int64 [2] (seed, step).
        keys: int64 [R, L] row keys.
    """
    return masked & (philox.uniform(rng, keys, torch.zeros_like(keys)) < shares[:, None])


class Commits:
    """What a step's open slots are filled with, and which of them: draws, ranking and choice.

    Args:
        config: settings.
        canvas: the trajectories; filled in place.
        undrawable: int64 ids that are never drawn; empty leaves all alone.
        mask_token_id, eos_token_id: of the diffusion model's vocabulary.
        memory: the batch's.
        faults: notes rows whose logits are not finite.
        look: reads [R] int64 numbers, and how far the responses are settled given the slots [R, L] that may still
            change: a step's one wait for the device. With ``wanted=False`` the numbers are not needed.
    """

    def __init__(
        self,
        config: GuidanceConfig,
        canvas: Canvas,
        undrawable: torch.Tensor,
        mask_token_id: int,
        eos_token_id: int,
        memory: Memory,
        faults: Faults,
        look: Look,
    ) -> None:
        self._config, self._canvas, self._undrawable = config, canvas, undrawable
        self._mask, self._eos = mask_token_id, eos_token_id
        self._memory, self._faults, self._look = memory, faults, look
        # Where looking costs nothing the loop looks more often and draws less.
        self._reads_are_free = canvas.tokens.device.type == "cpu"
        # [R], added to: log-probabilities of the committed tokens, under the logits that they are drawn from.
        self.log_probs: torch.Tensor | None = None

    def base_ranking(self, phi: torch.Tensor, opened: OpenSlots, step: int) -> torch.Tensor | None:
        """[R, L] confidence before guidance, where that is what ranks the slots; phi is moved in place later."""
        config = self._config
        if config.alg != "entropy" or config.confidence != "base":
            return None
        with phases.scope(phases.SELECT):
            nothing = torch.zeros(len(opened), dtype=torch.int64, device=phi.device)
            of_model = config.temperature, config.backend
            base = unmask_confidence(phi, nothing, alg="entropy", temperature=of_model[0], backend=of_model[1])
            self._faults.note_logits(step, opened.rows, base.isnan())
            return self._over_slots(base, opened)

    def commit_any(
        self,
        phi: torch.Tensor,
        opened: OpenSlots,
        step: int,
        wanted: torch.Tensor,
        shares: tuple[float, ...],
        ranking: torch.Tensor | None,
    ) -> torch.Tensor:
        """Draw at every open slot, then choose.

        Args:
            phi: [N, V], guided.
            opened: its slots.
            step: for the draws.
            wanted: int64 [R], commits a trajectory.
            shares: of each trajectory, see :class:`Plan`.
            ranking: what :meth:`base_ranking` gave.

        Returns:
            [R, L] bool, the slots committed.
        """
        canvas = self._canvas
        drawn = self._draw(phi, opened.keys, opened.rows, step, shares)
        with phases.scope(phases.SELECT):
            chosen = self._choose(phi, drawn, opened, step, wanted, shares, ranking)
            self._fill(chosen, canvas.response.index_put((opened.rows, opened.slots), drawn))
            if self.log_probs is not None:
                backend = self._config.backend
                probs = unmask_confidence(phi, drawn, alg="maskgit_plus", temperature=1.0, backend=backend)
                committed = chosen[opened.rows, opened.slots]
                self.log_probs.index_add_(0, opened.rows, probs.double().log().where(committed, 0.0))
        return chosen

    def commit_ranked(
        self,
        move: Callable[[torch.Tensor], torch.Tensor],
        opened: OpenSlots,
        step: int,
        counts: tuple[int, ...],
        wanted: torch.Tensor,
        shares: tuple[float, ...],
        ranking: torch.Tensor,
    ) -> torch.Tensor:
        """As :meth:`commit_any` with a ranking, but drawing only where the choice may fall.

        The best slots, as many as are wanted, are moved and drawn. Where some drew an EOS that is to be postponed the
        next in line are drawn: as many as are missing, again and again, where the host may look at results for
        nothing; elsewhere, after its one look, all that the trajectory has left. Then the best of what was drawn are
        chosen, postponed ones last and by position, as ties are.

        Args:
            move: gives the guided logits [n, V] of some rows of phi.
            counts: as `wanted`, on the host.

        Returns:
            [R, L] bool, the slots committed.
        """
        config, canvas = self._config, self._canvas
        ranking = self._perturbed(ranking, step)
        with phases.scope(phases.SELECT):
            order = ranked_slots(ranking, canvas.masked)
            index_of_slot = opened.index_of_slot(canvas.masked)
            tried, postponed = torch.zeros_like(canvas.masked), torch.zeros_like(canvas.masked)
            proposal = canvas.response.clone()
        seen, again = [0] * len(counts), False
        needed, needed_there = [min(count, n) for count, n in zip(counts, opened.counts, strict=True)], wanted
        while any(needed):
            with phases.scope(phases.SELECT):
                first = on_device(seen, wanted.device) if again else torch.zeros_like(wanted)
                rows, ranks = _runs(first, needed_there, sum(needed))
                slots = order[rows, ranks]
                members = index_of_slot[rows, slots]
            with phases.scope(phases.UPDATE):
                moved = move(members)
            drawn = self._draw(moved, opened.keys[members], rows, step, shares)
            with phases.scope(phases.SELECT):
                proposal[rows, slots] = drawn
                tried[rows, slots] = torch.ones_like(rows, dtype=torch.bool)
                eos = (drawn == self._eos) & config.deprioritize_eos
                postponed[rows, slots] = eos
                seen = [n + count for n, count in zip(seen, needed, strict=True)]
                left = [n - done for n, done in zip(opened.counts, seen, strict=True)]
                if again and not self._reads_are_free:
                    break  # all was drawn where anything was missing
                again = True
                missing = torch.zeros_like(wanted).index_put_((rows,), eos.long(), accumulate=True)
                # What was drawn and is not postponed is among the best: it will be committed whatever follows.
                unsure = canvas.masked & ~(tried & ~postponed)
                counted = self._look(missing, config.deprioritize_eos, unsure) or [0] * len(seen)
                if self._reads_are_free:
                    needed = [min(count, n) for count, n in zip(counted, left, strict=True)]
                else:
                    needed = [n if count else 0 for count, n in zip(counted, left, strict=True)]
                needed_there = on_device(needed, wanted.device) if any(needed) else missing
        with phases.scope(phases.SELECT):
            chosen = best_positions(ranking.masked_fill(postponed, -torch.inf), tried, wanted)
            self._fill(chosen, proposal)
        return chosen

    def _fill(self, chosen: torch.Tensor, proposal: torch.Tensor) -> None:
        response = self._canvas.response
        response.copy_(torch.where(chosen, proposal, response))
        # A mask token can only be drawn where undrawable ids are left alone, and not at a trajectory's last step; its
        # slot then stays open, as published.
        self._canvas.masked &= ~chosen | (response == self._mask)

    def _over_slots(self, column: torch.Tensor, opened: OpenSlots) -> torch.Tensor:
        """[R, L] from [N], -inf where nothing is open."""
        grid = torch.full(self._canvas.masked.shape, -torch.inf, dtype=column.dtype, device=column.device)
        grid[opened.rows, opened.slots] = column
        return grid

    def _draw(
        self, phi: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, step: int, shares: tuple[float, ...]
    ) -> torch.Tensor:
        """Tokens [n] from the filtered softmax of phi [n, V]; notes the trajectories whose logits are not finite."""
        config = self._config
        # Some heads have no row for the mask.
        if 1.0 in shares and not self._undrawable.numel() and self._mask < phi.shape[1]:
            # Drawn at a trajectory's last step, a mask token would be returned as text.
            last = on_device([share == 1.0 for share in shares], phi.device, torch.bool)
            phi[:, self._mask].masked_fill_(last[rows], -torch.inf)
        with phases.scope(phases.DRAW):
            drawn = sample_tokens(
                phi,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=config.seed,
                counter=draw_counter(step, FINAL_DRAW),
                keys=keys,
                backend=config.backend,
            )
        self._faults.note_logits(step, rows, drawn < 0)
        return drawn.clamp(min=0)

    def _choose(
        self,
        phi: torch.Tensor,
        drawn: torch.Tensor,
        opened: OpenSlots,
        step: int,
        wanted: torch.Tensor,
        shares: tuple[float, ...],
        ranking: torch.Tensor | None,
    ) -> torch.Tensor:
        """[R, L] bool: the slots this step commits, every open one having been drawn."""
        config, canvas = self._config, self._canvas
        if config.alg == "origin":
            rng = make_rng(phi, config.seed, draw_counter(step, POSITIONS))
            chances = on_device(shares, phi.device, torch.float64)
            return independent_positions(canvas.masked, chances, rng, canvas.keys)
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
            eos = canvas.response.index_put((opened.rows, opened.slots), drawn) == self._eos
            ranking = ranking.masked_fill(eos, -torch.inf)
        if config.threshold is not None:
            wanted = torch.maximum(wanted, (ranking > config.threshold).sum(dim=1))
        return best_positions(self._perturbed(ranking, step), canvas.masked, wanted)

    def _perturbed(self, ranking: torch.Tensor, step: int) -> torch.Tensor:
        """The ranking [R, L] itself, or with the noise that makes it a draw of positions."""
        if not self._config.alg_temp:
            return ranking
        rng = make_rng(ranking, self._config.seed, draw_counter(step, POSITIONS))
        return perturbed(ranking, self._config.alg_temp, rng, self._canvas.keys)


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
