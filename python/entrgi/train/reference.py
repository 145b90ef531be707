"""The reference policy of the KL term: an earlier state of whatever is being trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class ReferencePolicy:
    """A copy of a network's trainable parameters, put in their place while the reference is asked.

    With LoRA that is the adapter alone, so no second model is held. Frozen parameters are shared. Under FSDP2 each
    process copies its own shards: make the reference after the network has been sharded.

    Args:
        network: its parameters that require a gradient are copied.

    Attributes:
        kept: the copies, by the parameters' names.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.kept = {name: live.detach().clone() for name, live in self._live().items()}

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of its own, rather than all of them the same."""
        return any(isinstance(kept, DTensor) for kept in self.kept.values())

    @torch.no_grad()
    def sync(self, mix: float = 1.0) -> None:
        """Move the reference to the policy: all the way, or the share `mix` of it."""
        for name, live in self._live().items():
            kept = self.kept[name]
            kept.lerp_(live.detach().to(kept.dtype), mix) if mix < 1 else kept.copy_(live)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network is the reference while inside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save(self, path: Path) -> None:
        """Write the copies (this process's shards of them) as safetensors, under the parameters' names."""
        save_file({name: _local(kept).contiguous() for name, kept in self.kept.items()}, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take what :meth:`save` wrote.

        Raises:
            ValueError: it is of another network, or sharded over another number of processes.
            FileNotFoundError: there is no such file.
        """
        given = load_file(path)
        shapes, expected = ({n: tuple(_local(p).shape) for n, p in found.items()} for found in (given, self.kept))
        if shapes != expected:
            odd = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
            raise ValueError(
                f"{path} holds a reference of {len(given)} parameters, expected those of the {len(expected)} that are "
                f"trained: {odd[0]} is {_told(shapes, odd[0])} there and {_told(expected, odd[0])} here"
            )
        for name, kept in self.kept.items():
            _local(kept).copy_(given[name])

    def _live(self) -> dict[str, nn.Parameter]:
        for module in self._network.modules():
            if isinstance(module, FSDPModule):  # a forward without a backward leaves the outermost module whole
                module.reshard()
        return {name: live for name, live in self._network.named_parameters() if live.requires_grad}

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, live in self._live().items():
            policy = live.detach().clone()
            live.copy_(self.kept[name])
            self.kept[name].copy_(policy)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's shard on this process, sharing its memory; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _told(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"
