"""dllm's samplers: an object with ``.sample``, ``.infill``, a model and a tokenizer.

While one of the two runs, the model's forward is wrapped as in :mod:`.forward`, and otherwise it is as it was; shift,
scale, prompts and sampling settings are the sampler's own. Caches of samplers that keep keys and values of earlier
blocks (Fast-dLLM with a cache, BD3LM, Nemotron) are followed by :mod:`.tracker`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .base import ForeignModel, Guidance, Integration, Parts
from .forward import LogitsHook
from .steering import Steering


class DllmIntegration(Integration):
    """An object with `sample`, `infill`, `model` and `tokenizer`; both calls are bound on the instance."""

    name = "dllm"

    @staticmethod
    def recognises(target: Any) -> bool:
        wanted = ("sample", "infill", "model", "tokenizer")
        return not isinstance(target, (type, torch.nn.Module)) and all(hasattr(target, name) for name in wanted)

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        mask = target.tokenizer.mask_token_id if parts.mask_token_id is None else parts.mask_token_id
        if mask is None:
            raise ValueError("the sampler's tokenizer has no mask token: pass mask_token_id=")
        foreign = ForeignModel.of(target.model, mask, bool(parts.shift))
        guidance.sampler = parts.sampler(foreign, target.tokenizer)
        guidance.steering = Steering(guidance.sampler)
        guidance.claim(target.model)
        for name in ("sample", "infill"):
            guidance.patch(name, SamplerCall(target, guidance, parts, name))


class SamplerCall:
    """`.sample` or `.infill`, guided; the same signature and return.

    Args:
        target: the sampler.
        guidance: its handle.
        parts: what guide() was given.
        name: of the method.
    """

    def __init__(self, target: Any, guidance: Guidance, parts: Parts, name: str) -> None:
        self._target, self._guidance, self._parts, self._name = target, guidance, parts, name
        self._own = getattr(target, name)
        functools.update_wrapper(self, self._own)

    def __call__(self, inputs: Sequence[Any], config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The target's call, its logits guided."""
        if not self._guidance.active:
            return self._own(inputs, config, *args, **kwargs)
        settings = config if config is not None else self._default_config()

        def get(name: str, default: Any = None) -> Any:
            return kwargs.get(name, getattr(settings, name, default))

        taken = {"top_p": get("top_p"), "top_k": get("top_k")}
        if get("temperature"):
            taken["temperature"] = get("temperature")
        if isinstance(inputs, torch.Tensor):
            prompts = inputs.reshape(-1, inputs.shape[-1]).tolist()
        else:
            prompts = [list(ids) if isinstance(ids, (list, tuple)) else ids.tolist() for ids in inputs]
        hook = LogitsHook(
            self._guidance,
            shift=bool(get("right_shift_logits", False)) if self._parts.shift is None else self._parts.shift,
            cfg_scale=(get("cfg_scale") or None) if self._parts.cfg_scale is None else self._parts.cfg_scale,
            canvas=self._parts.canvas,
            prompts=prompts if self._name == "sample" else None,
            edited=get("block_size") if get("editing_threshold") else None,
            **taken,
        )
        with torch.no_grad():
            with self._guidance.patched("forward", hook.around(self._target.model.forward), self._target.model):
                output = self._own(inputs, config, *args, **kwargs)
        sequences = getattr(output, "sequences", output)
        steering = self._guidance.steering
        if hook.used and steering is not None:
            self._guidance.rewards = steering.score(sequences)
        return output

    def _default_config(self) -> Any:
        """What the sampler takes where it is handed no config: its class's name with "Config" behind it."""
        kind = type(self._target)
        made = vars(sys.modules[kind.__module__]).get(kind.__name__ + "Config")
        return made() if callable(made) else None
