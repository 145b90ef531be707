"""Memory that a run takes once and uses at every denoising step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class Buffers:
    """Named tensors whose memory is kept: asked for again, a name gives a view of the same.

    The number of open slots falls from step to step, so that a run's first step takes what all later ones need. On a
    CPU that spares the page faults of fresh memory, on a GPU it keeps addresses fixed, as CUDA graphs need them.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor with whatever is in it; it holds until the name is asked for again."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype or held.device != device:
            self._held[name] = held = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(*shape)

    def rows(self, name: str, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """``source[index]`` in kept memory."""
        out = self.take(name, (index.shape[0], *source.shape[1:]), source.dtype, source.device)
        return torch.index_select(source, 0, index, out=out)
