"""Log-probabilities of completions under a masked diffusion model, from one forward with the completion masked.

Every completion slot holds the mask token, each prompt token is masked with a given probability, and the model's
distribution at each slot is read once: the one-step estimate of d1 (arXiv 2504.12216), as RGRL uses it too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from entrgi_kernels import ops
from entrgi_kernels.backends import philox
from entrgi_kernels.models import BackboneModel
from entrgi_kernels.models.base import logits_of, same_result
from entrgi_kernels.models.modules import evaluating, output_head


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2^31) that depends on all parts: small enough to be logged exactly as a float."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 33


def mask_prompts(
    tokens: torch.Tensor,
    attention: torch.Tensor,
    start: int,
    mask_token_id: int,
    probability: float,
    seed: int,
    keys: torch.Tensor,
) -> torch.Tensor:
    """The canvas that log-probabilities are read from: completion all masked, prompt masked at random.

    Args:
        tokens: [R, S] int64, left-padded prompts, then completions.
        attention: [R, S] bool, True at real tokens.
        start: first completion slot.
        mask_token_id: what masks.
        probability: of each prompt token to be masked.
        seed: of the draws; the same seed masks the same tokens again.
        keys: [R] int64, one a row. A draw depends on seed, key and the token's place in its prompt alone, so a row is
            masked alike in every batch, on every device, in every process.

    Returns:
        [R, S] int64.
    """
    canvas = tokens.clone()
    canvas[:, start:] = mask_token_id
    place = (attention[:, :start].long().cumsum(dim=1) - 1).clamp(min=0)
    rng = torch.tensor([seed, 0], dtype=torch.int64, device=tokens.device)
    drawn = philox.uniform(rng, keys[:, None], place) < probability
    canvas[:, :start].masked_fill_(drawn & attention[:, :start], mask_token_id)
    return canvas


class CompletionLogProbs:
    """Reads per-token log-probabilities of completions off a diffusion model.

    The vocabulary head computes them where it stands, by the fused operator, on the wanted rows alone: the logits
    [R, S, V] never exist. What leaves the network's forward is then log-probabilities, so wrappers that look after the
    network's outputs and parameters (DDP, FSDP, DeepSpeed, PEFT) keep working. Whether a network hands its head's
    output on unchanged is found out by trying; where it does not (soft-capping), or its head is no plain linear layer,
    logits and log-softmax are used.

    Args:
        model: the diffusion model's adapter.
        backend: of the operator.

    Attributes:
        fused: whether the operator is used.

    Raises:
        ValueError: the network lets padding change the other positions' logits.
    """

    def __init__(self, model: BackboneModel, backend: str = "auto") -> None:
        if not model.pad_invariant:
            raise ValueError(
                f"{type(model.module).__name__} lets padding change the logits of other positions: expected a network "
                "that honours its attention mask, completions of several lengths cannot be trained on together"
            )
        self.model = model
        self.backend = backend
        self._head = output_head(model.module)
        self.fused = type(self._head) is nn.Linear and self._head_output_is_kept()

    def __call__(
        self,
        network: nn.Module,
        canvas: torch.Tensor,
        attention: torch.Tensor,
        start: int,
        completions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Log-probabilities [R, L] in nats of `completions` [R, L] where `mask` [R, L] is True, else 0.

        Args:
            network: what to call: the adapter's module or a wrapper of it (PEFT, DDP, ...).
            canvas: [R, S] int64, see :func:`mask_prompts`.
            attention: [R, S] bool, the key padding mask; position ids count its True entries.
            start: first completion slot.

        Returns:
            float32 (float64 under a float64 model); differentiable.
        """
        rows, slots = mask.nonzero(as_tuple=True)
        # Slot i of a shifting model (Dream) is read at position i - 1.
        flat = rows * canvas.shape[1] + start + slots - int(self.model.shift)
        targets = completions[rows, slots]
        arguments = self.model.inputs(attention, not bool(attention.all()))
        if self.fused:
            with _computing(self._head, lambda hidden: self._log_probs(hidden, flat, targets)):
                found = logits_of(network(canvas, **arguments)).flatten()
        else:
            logits = logits_of(network(canvas, **arguments))
            logits = logits.flatten(0, 1).index_select(0, flat)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            found = wide.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        return found.new_zeros(mask.shape).index_put((rows, slots), found)

    def _log_probs(self, hidden: torch.Tensor, flat: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert isinstance(self._head, nn.Linear)
        tensors = [hidden.flatten(0, -2).index_select(0, flat), self._head.weight, self._head.bias]
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # what a linear layer would be handed
            dtype = torch.get_autocast_dtype(device)
            tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
        rows, weight, bias = tensors
        return ops.token_log_prob(rows, weight, targets, bias=bias, backend=self.backend).view(1, -1, 1)

    def _head_output_is_kept(self) -> bool:
        network, device = self.model.module, self.model.device
        tokens = torch.arange(6, device=device).remainder(self.model.vocab_size)[None]
        attention, mask = torch.ones_like(tokens, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool)
        arguments = (network, tokens, attention, 1, tokens[:, 1:], mask[:, 1:])
        with torch.no_grad(), evaluating(network):
            self.fused = False
            plain = self(*arguments)
            self.fused = True
            try:
                return same_result(self(*arguments).to(plain.dtype), plain)
            except (RuntimeError, ValueError, TypeError):  # a network that wants V logits for what it does to them
                return False


@contextmanager
def _computing(module: nn.Module | None, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let `function` stand in for a module's forward while inside; the module's hooks stay in force."""
    assert module is not None
    own: Any = module.__dict__.get("forward")
    module.forward = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
