"""Responses filled block by block, from left to right; without blocks, all at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .canvas import Canvas
from .denoising import Denoiser, OnStep
from .errors import NonFiniteLogitsError, NonFiniteRewardError
from .results import StepTrace
from .schedules import steps_of_block


def fill(
    denoiser: Denoiser,
    block_length: int | None,
    *,
    traces: list[list[StepTrace]] | None = None,
    on_step: OnStep | None = None,
    every_step: bool = False,
) -> torch.Tensor:
    """Fill every masked slot of a canvas, in place.

    A block takes the share of the denoising steps that its slots are of the response, at least one. The reward reads
    the prompt, the finished blocks, the block that is being filled, and its suffix. Trajectories whose finished blocks
    hold an end-of-sequence token are done: nothing more is computed for them, and pad tokens fill what is left.

    Args:
        denoiser: of the whole canvas.
        block_length: slots of a block, counted from where the model counts them; None for a single block.
        traces, on_step, every_step: as in :meth:`Denoiser.run`.

    Returns:
        [R, L] int64, the responses.

    Raises:
        NonFiniteLogitsError, NonFiniteRewardError, RuntimeError: as :meth:`Denoiser.run`.
    """
    if block_length is None:
        return denoiser.run(traces=traces, on_step=on_step, every_step=every_step)
    canvas, config, score = denoiser.canvas, denoiser.config, denoiser.score
    count, slots = canvas.masked.shape
    device = canvas.tokens.device
    offsets = _offsets(denoiser.model, canvas)
    begins = torch.tensor(offsets, dtype=torch.int64, device=device)
    block_of_slot = (torch.arange(slots, device=device) + begins[:, None]) // block_length
    # Trajectories that go on, and each one's row in the forwards.
    active, held, edited = list(range(count)), list(range(count)), False
    for number in range((slots + max(offsets, default=0) - 1) // block_length + 1):
        finished = ~canvas.masked & (block_of_slot < number)
        ended = ((canvas.response == score.eos_token_id) & finished).any(dim=1)
        open_slots = canvas.masked & ~ended[:, None]
        here = open_slots & (block_of_slot == number)
        # A block may be given that others follow: its row stays.
        left, later = torch.stack([here, open_slots & (block_of_slot > number)]).sum(dim=2).tolist()
        going = [row for row in active if left[row] or later[row]]
        if not any(left[row] for row in going):
            continue
        if denoiser.search is not None:
            going = active  # whoever has ended may yet be copied, or replaced
        there = [held[active.index(row)] for row in going]
        rows = None if there == list(range(len(active))) else torch.tensor(there, device=device)
        of_all = torch.tensor(going, device=device)
        end = min(slots, (number + 1) * block_length)
        ends = [min(slots, (number + 1) * block_length - offsets[row]) for row in going]
        everyone = len(going) == count
        part = Canvas(
            tokens=canvas.tokens if everyone else canvas.tokens[of_all],
            attention=canvas.attention if everyone else canvas.attention[of_all],
            start=canvas.start,
            masked=here if everyone else here[of_all],
            keys=canvas.keys if everyone else canvas.keys[of_all],
            repeats=canvas.repeats if everyone and number == 0 else 1,
            ends=None if set(ends) == {end} else torch.tensor(ends, device=device),
            end=end,  # of the block's number alone: the suffix's place depends on no other trajectory
        )
        if going != active:
            score = score.select(torch.tensor([active.index(row) for row in going], device=device))
        one = dataclasses.replace(
            denoiser,
            canvas=part,
            score=score,
            first=canvas.start + number * block_length - begins[of_all],
            rows=rows,
            # Where a hook changed what was final, the reward would go on with what was there before.
            settled=0 if edited else max(0, number * block_length - max(offsets[row] for row in going)),
            block=number,
        )
        if denoiser.search is not None:
            denoiser.search.canvas, denoiser.search.also = part, [canvas.masked]
        first_step, steps = steps_of_block(config.steps, number, slots // block_length)
        try:
            one.run(
                steps=steps,
                first_step=first_step,
                traces=None if traces is None else [traces[row] for row in going],
                on_step=on_step if everyone or on_step is None else _on_all(on_step, canvas, of_all),
                every_step=every_step,
            )
        except (NonFiniteLogitsError, NonFiniteRewardError) as error:
            error.trajectory = going[error.trajectory]
            raise
        edited |= one.edited
        if not everyone:
            canvas.tokens[of_all] = part.tokens
        # What has ended before this block keeps its masks until the end.
        canvas.masked &= (block_of_slot != number) | (canvas.response == denoiser.model.mask_token_id)
        held = [row // canvas.repeats if one.narrow else row for row in range(len(going))]
        active = going
    canvas.response.masked_fill_(canvas.masked, score.pad_token_id)
    canvas.masked.fill_(False)
    return canvas.response


def _offsets(model: Any, canvas: Canvas) -> list[int]:
    """How many of each prompt's last tokens stand in the block that its response begins in."""
    lengths = canvas.attention[:, : canvas.start].sum(dim=1).tolist()
    return model.block_offsets(lengths) if hasattr(model, "block_offsets") else [0] * len(lengths)


def _on_all(on_step: OnStep, canvas: Canvas, rows: torch.Tensor) -> OnStep:
    """A hook that is shown all trajectories while only some go on."""

    def shown(step: int, tokens: torch.Tensor) -> torch.Tensor | None:
        canvas.tokens[rows] = tokens
        replaced = on_step(step, canvas.tokens)
        if replaced is None:
            return None
        if replaced is not canvas.tokens:
            canvas.tokens.copy_(replaced)
        return canvas.tokens[rows]

    return shown
