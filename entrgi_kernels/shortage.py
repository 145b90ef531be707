"""Errors that tell of the machine and not of what was computed: too little memory."""

from __future__ import annotations

import errno
import re

import torch

# What CUDA, HIP, their libraries, Triton, torch's CPU allocator and its mmap say without a class of their own.
_SAID = re.compile(
    r"out of memory(?! (bounds?|range))|(can't|cannot) allocate memory|not enough memory|STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that less at a time might do."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or "(os error 12)" in str(error)  # safetensors' is a plain OSError
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None
