"""NVTX ranges that cost one attribute look-up when they are off.

``entrgi_kernels.backends.triton.nvtx.enable()`` turns them on for the process (``benchmarks/profile.py`` does).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

enabled = False
_Function = TypeVar("_Function", bound=Callable[..., Any])
_NOTHING = nullcontext()


def enable(on: bool = True) -> None:
    """Turn ranges on or off for this process."""
    global enabled
    enabled = on


@contextmanager
def _pushed(name: str):
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def scope(name: str, prefix: str = "entrgi::") -> AbstractContextManager[None]:
    """A range around a ``with`` block; nothing when ranges are off."""
    return _pushed(prefix + name) if enabled else _NOTHING


def ranged(function: _Function) -> _Function:
    """Decorate a raw function with a range of its own name."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not enabled:
            return function(*args, **kwargs)
        with _pushed(f"entrgi::{function.__name__}"):
            return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
