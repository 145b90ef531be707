"""What the GPU tests of several backends share."""

from __future__ import annotations

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
