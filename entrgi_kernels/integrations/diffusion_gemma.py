"""transformers' ``DiffusionGemma.generate``: canvases of noise instead of masks, every slot predicted at every step.

What guidance means there: each denoising step predicts all slots of the canvas anew, accepts the surest and fills the
others with fresh noise; what is returned in the end is the prediction. So all slots of the canvas are guided at every
step, whatever tokens it holds, and the reward model reads the earlier canvases, then the blend of every slot. The
guided logits are also what the model conditions its next prediction on (self-conditioning), so guidance adds up over
steps: smaller learning rates go further than with mask tokens.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from .base import ForeignModel, Guidance, Integration, Parts
from .steering import Steering


class DiffusionGemmaIntegration(Integration):
    """A model with DiffusionGemma's ``generate``: a logits processor is put before all others."""

    name = "diffusion-gemma"

    @staticmethod
    def recognises(target: Any) -> bool:
        canvas = getattr(getattr(target, "config", None), "canvas_length", None)
        return isinstance(target, nn.Module) and canvas is not None and hasattr(target, "_prepare_sampler")

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        guidance.sampler = parts.sampler(ForeignModel.of(target, None))
        guidance.steering = Steering(guidance.sampler)
        guidance.claim(target)
        generation = GemmaGeneration(target, guidance)
        guidance.patch("generate", generation)
        guidance.patch("_prepare_sampler", generation.prepare_sampler)


class GemmaGeneration:
    """A replacement of a model's bound `generate`, with the same signature and return.

    Args:
        model: the target.
        guidance: its handle.
    """

    def __init__(self, model: Any, guidance: Guidance) -> None:
        self._guidance = guidance
        self._own = model.generate
        self._own_prepare_sampler = model._prepare_sampler
        self._logits: CanvasLogits | None = None
        functools.update_wrapper(self, model.generate)

    def __call__(self, input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Guided `generate`; a cache of earlier turns hides them from the reward model, which reads `input_ids`."""
        if not self._guidance.active:
            return self._own(input_ids, *args, **kwargs)
        if input_ids is None or input_ids.dim() != 2:
            raise ValueError(
                f"input_ids={None if input_ids is None else list(input_ids.shape)}: expected prompt ids [B, P]"
            )
        given = inspect.signature(self._own).bind_partial(input_ids, *args, **kwargs)
        others = given.arguments.get("logits_processor")
        self._logits = CanvasLogits(self._guidance, input_ids, kwargs.get("attention_mask"))
        given.arguments["logits_processor"] = LogitsProcessorList([self._logits, *(others or [])])
        try:
            output = self._own(*given.args, **given.kwargs)
        finally:
            self._logits = None
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        assert self._guidance.steering is not None
        self._guidance.rewards = self._guidance.steering.score(sequences)
        return output

    def prepare_sampler(self, generation_config: Any) -> Any:
        """The model's own sampler; the settings that a call came down to are read in passing."""
        if self._logits is not None:
            self._logits.begin(generation_config)
        return self._own_prepare_sampler(generation_config)


class CanvasLogits(LogitsProcessor):
    """Guides the logits [B, C, V] of a whole canvas.

    Args:
        guidance: the handle.
        prompts: [B, P] int64.
        attention_mask: [B, P], 0 on padding; None where there is none.
    """

    def __init__(self, guidance: Guidance, prompts: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        self._guidance, self._start = guidance, prompts.shape[1]
        real = torch.ones_like(prompts, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        # A mask may also cover what a cache holds.
        pairs = zip(prompts, real[:, -self._start :], strict=True)
        self._prompts = [ids[keep].tolist() for ids, keep in pairs]
        self._temperatures: tuple[float, float, int] | None = None
        self._ends: list[int] = []

    def begin(self, config: Any) -> None:
        """The call's settings are known: temperatures, steps, the tokens that end a response."""
        if config.t_min is not None and config.t_max is not None:
            self._temperatures = config.t_min, config.t_max, config.max_denoising_steps
        ends = config.eos_token_id
        self._ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
        steering = self._guidance.steering
        assert steering is not None
        starts = [self._start] * len(self._prompts)
        steering.begin(self._prompts, starts, seed=self._guidance.seed(), ends=self._ends)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, cur_step: Any) -> torch.Tensor:
        """Guided scores.

        Args:
            input_ids: [B, P + n C], the prompt and the canvases that are done.
            scores: [B, C, V].
            cur_step: steps left, from the number of steps down to 1.
        """
        temperature = None
        if self._temperatures is not None:
            low, high, steps = self._temperatures
            temperature = low + (high - low) * int(cur_step) / steps
        return guide_canvas(self._guidance.steering, input_ids[:, self._start :], scores, self._ends, temperature)


def guide_canvas(
    steering: Any,
    done: torch.Tensor,
    scores: torch.Tensor,
    ends: list[int],
    temperature: float | None,
    fixed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Scores [B, C, V] of a canvas, guided; a row that an earlier canvas has ended stays as it is.

    Args:
        steering: the guidance.
        done: [B, n C] int64, the canvases before this one.
        scores: [B, C, V], left as they are.
        ends: ids that end a response.
        temperature: the loop's in this step; None is the setting's.
        fixed: (tokens, which of them the loop keeps [B, C]); None where it predicts every slot anew.
    """
    batch, slots = scores.shape[:2]
    ends = [*ends, steering.sampler.eos_token_id]
    over = torch.isin(done, torch.tensor(ends, device=done.device)).any(dim=1)
    opened = (~over)[:, None].expand(batch, slots)
    canvas = torch.full((batch, slots), steering.sampler.pad_token_id, device=done.device)
    if fixed is not None:
        canvas = torch.where(fixed[1], fixed[0], canvas)
        opened = opened & ~fixed[1]
    response = torch.cat([done, canvas], dim=1)
    padded = torch.nn.functional.pad(opened, (done.shape[1], 0))
    if not opened.any():
        return scores
    rows, places = opened.nonzero(as_tuple=True)
    moved = scores.clone()
    moved[rows, places] = steering(scores[rows, places], response, padded, temperature)
    return moved
