"""Errors that tell of the machine and not of what was computed: too little memory."""

from __future__ import annotations

import errno

import torch

# What CUDA, its libraries, Triton and torch's CPU allocator say in errors that have no class of their own.
_SAID = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that less at a time might do."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or "os error 12" in str(error)  # safetensors' is a plain OSError
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)
