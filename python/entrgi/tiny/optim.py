"""Optimiser and schedule shared by the three training runs: Muon on the matrices, AdamW on everything else."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class Optimizers:
    """Muon for hidden matrices, AdamW for embeddings, norms and heads; warm-up, a plateau, linear decay to zero."""

    def __init__(self, model: torch.nn.Module, steps: int, *, lr: float, warmup: int = 100, decay_from: float = 0.3):
        hidden, rest = [], []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name and "score" not in name and "lm_head" not in name
            (hidden if is_matrix else rest).append(parameter)
        # Muon's update has unit scale whatever the gradient's, hence a rate ten times AdamW's.
        self.parts = [
            torch.optim.Muon(hidden, lr=10 * lr, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.parameters = hidden + rest
        warmup = min(warmup, max(1, steps // 4))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            left = (steps - step) / max(1.0, steps * (1 - decay_from))
            return min(1.0, left)

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(part, factor) for part in self.parts]

    def step(self) -> None:
        """Clip the gradients, step both optimisers and their rates, and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            part.step()
            schedule.step()
            part.zero_grad(set_to_none=True)


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of row indices: permutation after permutation."""
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % size].split(size) if n >= size else [order]


@torch.no_grad()
def round_weights(model: torch.nn.Module) -> None:
    """Round the weights to bfloat16 in place, so that what is stored is what is measured.

    Parameters only: ``Module.to`` would round the rotary frequencies too, which a loaded model has in full.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
