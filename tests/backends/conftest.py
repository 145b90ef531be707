"""What tests of several backends share."""

from __future__ import annotations

import importlib.util
import os
import types
from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def check_captured_draws() -> Callable[[Callable[[], torch.Tensor], torch.Tensor], None]:
    """A check that a captured CUDA graph of `step`, which returns tokens [N], draws anew for each content of `rng`.

    `rng` is int64 [2] on the device, (seed, step); the replayed draws must be those of the plain call.
    """

    def check(step: Callable[[], torch.Tensor], rng: torch.Tensor) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens = step()
        seen = []
        for number in range(3):
            rng[1] = number
            graph.replay()
            seen.append(tokens.clone())
            assert torch.equal(tokens, step())
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])

    return check


# Unpatched too, Triton 3.6's interpreter fails with NumPy 2.4: "only 0-dimensional arrays can be converted".
def _patch_the_interpreter_once() -> None:
    """Let nested device functions reuse the language patch of the launch that calls them.

    The interpreter walks through all of triton.language at every call of a device function, tl.sum included: nine
    tenths of a launch. Inside one launch the second walk changes nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original, active = interpreter._patch_lang, []

    def once(function):
        if active:
            return interpreter._LangPatchScope()
        scope = original(types.FunctionType((lambda: 0).__code__, {"tl": tl, "core": tl.core}))
        active.append(scope)
        restore = scope.restore

        def done():
            active.clear()
            restore()

        scope.restore = done
        return scope

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = once


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _patch_the_interpreter_once()
