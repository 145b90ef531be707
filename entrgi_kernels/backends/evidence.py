"""Which engine "auto" takes ahead of its usual order, shape by shape: only what a committed result shows.

A row of :data:`TABLE` says that on one device a backend computed an operator correctly and faster than the others, for
a range of shapes; it names the file under benchmarks/results/ that holds the timings (a benchmark prints a time only
when its check has passed). tests/backends/cuda/test_cuda_backend.py reads those files and fails on a row that they do
not bear out.
The table is empty: the CUDA kernels have not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Evidence:
    """A backend is the fastest correct one for an operator on a device, over a range of shapes.

    Attributes:
        backend: the backend's name. op: the raw function's name.
        device: ``torch.cuda.get_device_name``, as in the result's rows.
        dtype: of the logits.
        rows: least and most N. columns: least and most V; both ends are included, and both are measured ones.
        result: file name under benchmarks/results/.
    """

    backend: str
    op: str
    device: str
    dtype: torch.dtype
    rows: tuple[int, int]
    columns: tuple[int, int]
    result: str

    def covers(self, op: str, device: str, dtype: torch.dtype, n: int, v: int) -> bool:
        """Whether the row speaks of such a call."""
        return (
            (self.op, self.device, self.dtype) == (op, device, dtype)
            and self.rows[0] <= n <= self.rows[1]
            and self.columns[0] <= v <= self.columns[1]
        )


TABLE: tuple[Evidence, ...] = ()


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def fastest(op: str | None, tensor: torch.Tensor) -> str | None:
    """The backend that the table names for an operator on logits [N, V]; None where it says nothing."""
    if not TABLE or op is None:
        return None
    device, (n, v) = _device_name(tensor.device), tensor.shape
    for row in TABLE:
        if row.covers(op, device, tensor.dtype, n, v):
            return row.backend
    return None
