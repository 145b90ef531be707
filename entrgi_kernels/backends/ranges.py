"""Named ranges of what runs: raw functions of the GPU backends, and whatever else a caller names.

Nobody listens by default, and a range then costs one look at an empty tuple. :func:`enable_nvtx` shows them to Nsight
Systems and Nsight Compute; anything with ``begin(name)`` and ``end(name)`` may be put into :data:`listeners` by
:func:`listening` (``benchmarks/harness/phases.py`` takes times and counts FLOPs that way).

A function's range has its name behind ``entrgi::``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch

OPERATOR = "entrgi::"


class Listener(Protocol):
    """Is told of every range of this process."""

    def begin(self, name: str) -> None:
        """A range of this name begins, inside those that have not ended."""
        ...

    def end(self, name: str) -> None:
        """The innermost range, which has this name, ends."""
        ...


class Nvtx:
    """Shows ranges to NVIDIA's profilers."""

    def begin(self, name: str) -> None:
        torch.cuda.nvtx.range_push(name)

    def end(self, name: str) -> None:
        torch.cuda.nvtx.range_pop()


listeners: tuple[Listener, ...] = ()
_Function = TypeVar("_Function", bound=Callable[..., Any])
_NOTHING = nullcontext()
_NVTX = Nvtx()


def enable_nvtx(on: bool = True) -> None:
    """Turn NVTX ranges on or off for this process."""
    global listeners
    listeners = (*(one for one in listeners if one is not _NVTX), *([_NVTX] if on else []))


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of every range inside the block."""
    global listeners
    listeners = (*listeners, listener)
    try:
        yield
    finally:
        listeners = tuple(one for one in listeners if one is not listener)


@contextmanager
def _told(name: str) -> Iterator[None]:
    told = listeners  # whoever hears the beginning hears the end
    for listener in told:
        listener.begin(name)
    try:
        yield
    finally:
        for listener in reversed(told):
            listener.end(name)


def scope(name: str) -> AbstractContextManager[None]:
    """A range around a ``with`` block; nothing when nobody listens."""
    return _told(name) if listeners else _NOTHING


def ranged(function: _Function) -> _Function:
    """Decorate a raw function with a range of its own name."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not listeners:
            return function(*args, **kwargs)
        with _told(OPERATOR + function.__name__):
            return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
