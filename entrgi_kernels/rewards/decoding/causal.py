"""A causal language model's vocabulary projection, applied where and as far as it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...models.base import logits_of, same_result
from ...models.modules import module_device, output_head
from .sequences import wide

# Logits held at once, in bytes; a row of 152k float32 logits takes 0.6 MB.
CHUNK_BYTES = 64 << 20
# Config entries that transformers multiplies or divides logits by (Cohere, Falcon-H1; Granite).
_FACTORS, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)


class CausalHead:
    """The upper end of a causal LM: from final states of its backbone to logits.

    Args:
        module: the causal LM.

    Attributes:
        backbone: the network below, None where it cannot be told from the head.
        projection: the vocabulary projection, None where there is none with plain weights.
        cap: logits are ``cap tanh(. / cap)`` (Gemma 2); None without.
        scale: what logits are multiplied by.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        core = module.get_base_model() if hasattr(module, "get_base_model") else module  # PEFT wraps what it adapts
        config: Any = getattr(core, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        projection: Any = output_head(core)
        backbone = getattr(core, getattr(core, "base_model_prefix", "") or "model", None)
        whole = not isinstance(backbone, nn.Module) or not isinstance(getattr(projection, "weight", None), torch.Tensor)
        self.backbone: nn.Module | None = None if whole or backbone is core else backbone
        self.projection: nn.Linear | None = None if self.backbone is None else projection
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = 1.0
        for name in _FACTORS:
            self.scale *= getattr(config, name, None) or 1.0
        for name in _DIVISORS:
            self.scale /= getattr(config, name, None) or 1.0

    @property
    def weight(self) -> torch.Tensor:
        """[R, D], a row per token."""
        assert self.projection is not None
        return self.projection.weight

    @property
    def linear(self) -> bool:
        """Whether the mean of two tokens' logits is the logit of the mean of their rows."""
        return self.projection is not None and self.cap is None and getattr(self.projection, "bias", None) is None

    def logits(self, states: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [n, R] of final states [n, D], or of the tokens ``ids`` alone; float32, float64 where states are."""
        assert self.projection is not None
        if ids is None:
            logits = self.projection(states)
        else:
            bias = getattr(self.projection, "bias", None)
            logits = functional.linear(states, self.weight[ids], None if bias is None else bias[ids])
        logits = wide(logits)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def own_logits(self, ids: list[int]) -> torch.Tensor:
        """[T, R], the model's own logits of token ids."""
        logits = logits_of(self.module(torch.tensor([ids], device=module_device(self.module))))
        if logits.dim() != 3 or logits.shape[:2] != (1, len(ids)):
            raise ValueError(
                f"{type(self.module).__name__} returns logits of shape {tuple(logits.shape)} for a text of {len(ids)} "
                "tokens: expected causal language models, [1, T, R]"
            )
        return wide(logits[0])

    def check_causal(self) -> None:
        """Raise ValueError for networks whose predictions look at what they predict (masked LMs, encoders)."""
        if any(parameter.is_meta for parameter in self.module.parameters()):
            return
        with torch.no_grad():
            one, other = self.own_logits([1, 0, 1, 0]), self.own_logits([1, 0, 1, 1])
        if not same_result(one[:3], other[:3]):
            raise ValueError(
                f"{type(self.module).__name__} sees the tokens that follow, so its logits are no predictions: "
                "expected causal language models (AutoModelForCausalLM)"
            )


def by_chunks(states: torch.Tensor, width: int, score: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """A scalar [n] of each row of states [n, D], computed in chunks of rows, so that what is as wide as a vocabulary
    is never held for all of them.

    The gradient with respect to the states is taken along with the values and kept, [n, D]: neither logits nor
    activations wait for the backward.

    Args:
        states: differentiable.
        width: of the widest thing that a row needs, to choose the chunks.
        score: (some rows [c, D], which of the n they are) -> [c]; differentiable in the rows.
    """
    return _ByChunks.apply(states, max(1, CHUNK_BYTES // (4 * width)), score)


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, chunk: int, score: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> torch.Tensor:
        values, gradients = [wide(states.new_zeros(0))], [states.new_zeros(0, states.shape[1])]
        for start in range(0, len(states), chunk):
            some = slice(start, start + chunk)
            rows = states[some].detach()
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                rows.requires_grad_(ctx.needs_input_grad[0])
                value = score(rows, some)
                if ctx.needs_input_grad[0]:
                    gradients.append(torch.autograd.grad(value.sum(), rows)[0])
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return gradient[:, None].to(rows.dtype) * rows, None, None
