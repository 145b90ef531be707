"""The reference policy of the KL term: an earlier state of whatever is being trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class ReferencePolicy:
    """A copy of a network's trainable parameters, put in their place while the reference is asked.

    With LoRA that is the adapter alone, so no second model is held. Frozen parameters are shared.

    Args:
        network: its parameters that require a gradient are copied.
    """

    def __init__(self, network: nn.Module) -> None:
        self._live = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._kept = [parameter.detach().clone() for parameter in self._live]

    @torch.no_grad()
    def sync(self, mix: float = 1.0) -> None:
        """Move the reference to the policy: all the way, or the share `mix` of it."""
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.lerp_(live.detach().to(kept.dtype), mix) if mix < 1 else kept.copy_(live)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network is the reference while inside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            policy = live.detach().clone()
            live.copy_(kept)
            kept.copy_(policy)

    def state_dict(self) -> dict[str, Any]:
        """The copies, in the order of the network's parameters."""
        return {"parameters": self._kept}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the copies of :meth:`state_dict`.

        Raises:
            ValueError: they are of another network.
        """
        given = state["parameters"]
        if [tuple(p.shape) for p in given] != [tuple(p.shape) for p in self._kept]:
            raise ValueError(
                f"the saved reference has {len(given)} parameters that do not fit the {len(self._kept)} trained ones"
            )
        for kept, value in zip(self._kept, given, strict=True):
            kept.copy_(value)
