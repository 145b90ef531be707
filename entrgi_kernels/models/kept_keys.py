"""Keys and values of finished blocks, in memory that is written once.

Imported where a cache is needed, since it brings transformers along.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _Layer(DynamicLayer):
    """One layer's keys and values: new ones go behind the others, which are not copied for it."""

    keys: Any  # a tensor once there are any
    values: Any

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._memory: list[torch.Tensor | None] = [None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self._hold(key_states[..., :0, :], value_states[..., :0, :])
        length = self.get_seq_length()
        self.keys = self._append(0, self.keys, length, key_states)
        self.values = self._append(1, self.values, length, value_states)
        return self.keys, self.values

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
        self.is_initialized = True

    def _append(self, which: int, kept: torch.Tensor, length: int, new: torch.Tensor) -> torch.Tensor:
        end, memory = length + new.shape[-2], self._memory[which]
        if memory is None or memory.shape[-2] < end:
            memory = new.new_empty(*new.shape[:-2], max(end, self._capacity), new.shape[-1])
            if length:
                memory[..., :length, :] = kept
            self._memory[which] = memory
        memory[..., length:end, :] = new
        return memory[..., :end, :]

    def cut(self, length: int) -> None:
        self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]

    def select(self, rows: torch.Tensor) -> None:
        self.keys, self.values = (kept.index_select(0, rows.to(kept.device)) for kept in (self.keys, self.values))
        self._memory = [None, None]

    def keep(self, columns: torch.Tensor) -> None:
        self.keys, self.values = (kept.index_select(-2, columns.to(kept.device)) for kept in (self.keys, self.values))
        self._memory = [None, None]

    def copy(self) -> _Layer:
        """The same keys; either writes into memory of its own from here on."""
        other = _Layer(self._capacity)
        other._hold(self.keys, self.values)
        return other


class KeptKeys(DynamicCache):
    """A cache as transformers' networks take them. Only whoever made it cuts it; :meth:`length` notices others.

    Args:
        capacity: columns to make room for; more are taken when they come.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self.layer_class_to_replicate = partial(_Layer, capacity)  # type: ignore[assignment]

    def length(self) -> int:
        """How many columns are kept.

        Raises:
            RuntimeError: not the same in every layer.
        """
        lengths = {layer.get_seq_length() for layer in self._used()}
        if len(lengths) > 1:
            raise RuntimeError(f"the layers of a cache hold {sorted(lengths)} positions: expected one length")
        return lengths.pop() if lengths else 0

    def copy(self) -> KeptKeys:
        """Another cache that holds the same."""
        other = KeptKeys(self._capacity)
        other.layers = [layer.copy() if layer.is_initialized else _Layer(self._capacity) for layer in self._layers()]
        return other

    def cut(self, length: int) -> None:
        """Forget all but the first `length` columns."""
        for layer in self._used():
            layer.cut(length)

    def keep(self, columns: torch.Tensor) -> None:
        """Forget all but these columns, int64 [C]."""
        for layer in self._used():
            layer.keep(columns)

    def select(self, rows: torch.Tensor) -> None:
        """Rows [R'] int64 go on, in this order; a row may be there twice."""
        for layer in self._used():
            layer.select(rows)

    def _used(self) -> list[_Layer]:
        # Layers that share another's keys are never written.
        return [layer for layer in self._layers() if layer.is_initialized]

    def _layers(self) -> list[_Layer]:
        return list(self.layers)  # type: ignore[arg-type]  # made by layer_class_to_replicate alone
