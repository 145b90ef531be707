"""diffusers' ``LLaDA2Pipeline`` and ``DiffusionGemmaPipeline``: their scheduler's step is guided.

A pipeline's ``__call__`` belongs to its class, but every step of it goes through ``scheduler.step(model_output, ...)``,
which is handed the logits, the tokens and the sampling settings at once. So the scheduler's step is replaced on the
instance, and what it lacks (prompts, earlier blocks) is read in passing where the pipeline makes and uses it; the
model's own output is never changed.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from .base import ForeignModel, Guidance, Integration, Parts
from .diffusion_gemma import guide_canvas
from .steering import Steering


def _is_pipeline(target: Any, prepare: str) -> bool:
    wanted = ("model", "scheduler", prepare)
    return not isinstance(target, (type, torch.nn.Module)) and all(hasattr(target, name) for name in wanted)


class _Pipeline:
    """What both pipelines share: prompts, the patched step, the hook that reads.

    Args:
        target: the pipeline.
        guidance: its handle.
        parts: what guide() was given.
        mask_token_id: None for uniform noise.
        tokenizer: the pipeline's own.
        prepare: name of the method that encodes the prompts.
    """

    def __init__(
        self, target: Any, guidance: Guidance, parts: Parts, mask_token_id: int | None, tokenizer: Any, prepare: str
    ) -> None:
        self._guidance = guidance
        guidance.sampler = parts.sampler(ForeignModel.of(target.model, mask_token_id), tokenizer)
        guidance.steering = self._steering = Steering(guidance.sampler)
        guidance.claim(target.model)
        self._encode = getattr(target, prepare)
        guidance.patch(prepare, self.prepare)
        for name in ("step", "step_correct"):
            if hasattr(target.scheduler, name):
                guidance.patch(name, self._guided(getattr(target.scheduler, name)), target.scheduler)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own encoding; a call starts here."""
        encoded = self._encode(*args, **kwargs)
        if self._guidance.active:
            ids, mask = encoded[0], encoded[1]
            self._width = ids.shape[1]
            prompts = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
            # What the pipelines return begins behind the prompt.
            self._steering.begin(prompts, [0] * len(prompts), seed=self._guidance.seed())
            self.restart()
        return encoded

    def restart(self) -> None:
        """Forget an earlier call."""

    def _guided(self, own: Any) -> Any:
        signature = inspect.signature(own)

        @functools.wraps(own)  # the pipelines look at the step's signature
        def step(*args: Any, **kwargs: Any) -> Any:
            if not self._guidance.active:
                return own(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.arguments["model_output"] = self.steer(bound.arguments)
            return own(*bound.args, **bound.kwargs)

        return step

    def steer(self, arguments: dict[str, Any]) -> torch.Tensor:
        """The step's logits [B, C, V], guided."""
        raise NotImplementedError


class LLaDA2PipelineIntegration(Integration):
    """diffusers' LLaDA2Pipeline: masked slots of the current block, and committed ones that it may still edit."""

    name = "llada2-pipeline"

    @staticmethod
    def recognises(target: Any) -> bool:
        return _is_pipeline(target, "_prepare_input_ids")

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        mask = target.mask_token_id if parts.mask_token_id is None else parts.mask_token_id
        _LLaDA2(target, guidance, parts, mask, target.tokenizer, "_prepare_input_ids")


class _LLaDA2(_Pipeline):
    def __init__(self, target: Any, guidance: Guidance, *args: Any) -> None:
        super().__init__(target, guidance, *args)
        guidance.on_remove(target.model.register_forward_pre_hook(self._see, with_kwargs=True).remove)

    def restart(self) -> None:
        self._canvas: torch.Tensor | None = None

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._guidance.active and self._steering.started:
            canvas: Any = kwargs.get("input_ids", args[0] if args else None)
            self._canvas = canvas
            mask = kwargs.get("attention_mask")
            self._real = torch.ones_like(canvas, dtype=torch.bool) if mask is None else mask.bool()

    def steer(self, arguments: dict[str, Any]) -> torch.Tensor:
        logits, block = arguments["model_output"], arguments["sample"]
        if self._canvas is None:
            return logits
        masked = block == arguments.get("mask_token_id")
        opened = masked
        editing = arguments.get("editing_threshold")
        if editing is not None and editing > 0:
            opened = torch.ones_like(masked)  # unguided predictions would edit guidance away
        begin = self._canvas.shape[1] - block.shape[1]
        place = torch.arange(begin, self._canvas.shape[1], device=block.device)
        opened = opened & (place >= self._width) & self._real[:, begin:]
        response = torch.cat([self._canvas[:, :begin], block], dim=1)[:, self._width :]
        response = response.masked_fill(~self._real[:, self._width :], self._steering.sampler.pad_token_id)
        # The block may begin within the prompt, or behind the response's first slot.
        whole = torch.nn.functional.pad(opened, (begin, 0))[:, self._width :]
        rows, places = opened.nonzero(as_tuple=True)
        if not len(rows):
            return logits
        moved = logits.clone()
        moved[rows, places] = self._steering(logits[rows, places], response, whole, _temperature(arguments))
        return moved


class DiffusionGemmaPipelineIntegration(Integration):
    """diffusers' DiffusionGemmaPipeline: all slots of the canvas that the scheduler has not committed for good."""

    name = "diffusion-gemma-pipeline"

    @staticmethod
    def recognises(target: Any) -> bool:
        return _is_pipeline(target, "_prepare_inputs") and hasattr(target, "processor")

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        tokenizer = getattr(target.processor, "tokenizer", target.processor)
        _DiffusionGemma(target, guidance, parts, None, tokenizer, "_prepare_inputs")


class _DiffusionGemma(_Pipeline):
    def __init__(self, target: Any, guidance: Guidance, *args: Any) -> None:
        super().__init__(target, guidance, *args)
        self._scheduler = target.scheduler
        guidance.on_remove(target.model.model.encoder.register_forward_pre_hook(self._see, with_kwargs=True).remove)

    def restart(self) -> None:
        self._done: list[torch.Tensor] = []

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The encoder reads the prompt once, then each canvas that is done.
        if self._guidance.active and self._steering.started and kwargs.get("input_ids") is not None:
            self._done.append(kwargs["input_ids"])

    def steer(self, arguments: dict[str, Any]) -> torch.Tensor:
        logits, canvas = arguments["model_output"], arguments["sample"]
        if not self._done:
            return logits
        done = torch.cat([canvas[:, :0], *self._done[1:]], dim=1)
        fixed = None
        committed: Any = getattr(self._scheduler, "_committed", None)
        editing = arguments.get("editing_threshold")
        if editing is None:
            editing = getattr(self._scheduler.config, "editing_threshold", None)
        begun = int(arguments["timestep"]) > 0 and isinstance(committed, torch.Tensor)
        if begun and committed.shape == canvas.shape and editing is None:
            fixed = canvas, committed
        return guide_canvas(self._steering, done, logits, [], _temperature(arguments), fixed)


def _temperature(arguments: dict[str, Any]) -> float | None:
    """The step's temperature where it is one to blend at; None is the setting's."""
    return arguments.get("temperature") or None
