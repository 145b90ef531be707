"""The inner loop through torch.compile and CUDA graphs: options, off by default.

A graph replays what was launched once, for tensors at the same addresses and of the same sizes. So the open slots are
padded to a multiple of :data:`SLOTS` a trajectory: the rows too many are guided like any other but belong to no
trajectory. All M inner steps are one graph, captured at the second denoising step of each size (the first runs as
ever, which compiles kernels and fills caches) and replayed at the steps that follow; the draws' seeds and steps are
tensors whose content changes between replays. The cache of settled slots changes its size with every step and is not
used with graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .canvas import OpenSlots
from .config import GuidanceConfig
from .inner import Guided, InnerLoop
from .keys import draw_counter
from .memory import Memory, Name
from .scoring import takes

SLOTS = 8  # rows of phi are padded to a multiple of this, a trajectory: one graph serves so many steps


def check_device(device: torch.device) -> None:
    """Raise ValueError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs=True: expected models on a CUDA device, they are on {device}")


def cuda_capture(run: Callable[[], Guided]) -> tuple[Guided, Callable[[], None]]:
    """Capture what a function launches in a CUDA graph; nothing is computed yet.

    Returns:
        (The function's result, whose tensors every repetition fills again, the repetition).

    Raises:
        RuntimeError: something in it cannot be captured, such as a reward model that waits for the device.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
    except RuntimeError as error:
        raise RuntimeError(
            f"the inner step cannot be captured in a CUDA graph ({error}); run with cuda_graphs=False"
        ) from error
    return result, graph.replay


class CapturedLoop:
    """As :class:`InnerLoop`, replayed from graphs.

    Args:
        loop: what is captured.
        config: its settings.
        memory: the batch's memory; phi must lie in its "phi", see :meth:`padded`.
        trajectories: R.

    Raises:
        ValueError: not on a CUDA device, or a reward that looks at tokens, which padded rows have no place among.
    """

    def __init__(
        self,
        loop: InnerLoop,
        config: GuidanceConfig,
        memory: Memory,
        trajectories: int,
    ) -> None:
        device = loop.table.device
        if takes(loop.score.reward, "targets"):
            raise ValueError(f"cuda_graphs=True: not for {type(loop.score.reward).__name__}, which looks at tokens")
        check_device(device)
        self._loop, self._config, self._memory = loop, config, memory
        self._multiple, self._trajectories = SLOTS * trajectories, trajectories
        self._key: tuple[int, bool] | None = None
        self._replay: Callable[[], None] | None = None
        self._guided: Guided | None = None

    def padded(self, rows: int) -> int:
        """How many rows of memory phi is kept in for that many open slots."""
        return -(-rows // self._multiple) * self._multiple

    def __call__(
        self,
        phi: torch.Tensor,
        opened: OpenSlots,
        response: torch.Tensor,
        step: int,
        settled: int | None = None,
        defer: bool = False,
    ) -> Guided:
        """As the loop's own call; the result holds until the next."""
        key = self.padded(len(opened)), defer
        whole, slots, rngs = self._inputs(phi, opened, step, key[0])

        def run() -> Guided:
            return self._loop.run(whole, slots, response, rngs, None, defer)

        if key != self._key:  # the number of open slots only falls: a size left behind does not come back
            self._key, self._replay, self._guided = key, None, None
            return self._own(run(), len(opened))
        if self._replay is None:
            self._guided, self._replay = cuda_capture(run)
        self._replay()
        assert self._guided is not None
        return self._own(self._guided, len(opened))

    def _inputs(
        self, phi: torch.Tensor, opened: OpenSlots, step: int, size: int
    ) -> tuple[torch.Tensor, OpenSlots, torch.Tensor]:
        """(phi, its slots, rngs) at fixed addresses, padded."""
        count, device, take = len(opened), phi.device, self._memory.take
        inside = self._memory.holds("phi", phi)
        whole = take("phi", (size, phi.shape[1]), phi.dtype, device)
        if not inside:
            whole[:count].copy_(phi)
        whole[count:].zero_()

        def fixed(name: Name, column: torch.Tensor, filler: int) -> torch.Tensor:
            kept = take(name, (size,), torch.int64, device)
            kept[:count].copy_(column)
            kept[count:].fill_(filler)
            return kept

        rows = fixed("graph rows", opened.rows, self._trajectories)
        slots = fixed("graph slots", opened.slots, 0)
        keys = fixed("graph keys", opened.keys, 0)
        steps = self._config.inner_steps
        rngs = take("graph rngs", (steps, 2), torch.int64, device)
        rngs[:, 0].fill_(self._config.seed)
        rngs[:, 1].copy_(torch.arange(steps, device=device) + draw_counter(step, 0))
        return whole, OpenSlots(rows, slots, keys, opened.counts), rngs

    @staticmethod
    def _own(guided: Guided, count: int) -> Guided:
        """Without the rows too many."""
        columns = {name: getattr(guided, name)[..., :count] for name in ("weights", "unreadable", "gradients")}
        return dataclasses.replace(guided, **columns)


@contextmanager
def compiled(reward: Any, how: bool | str) -> Iterator[None]:
    """A reward's network with the norms and MLPs of its layers through torch.compile while inside.

    They are what eager torch runs in many small kernels; attention and products are one kernel each as they are, and
    the layers' caches would be compiled anew at every step. All layers share the compiled code, for any length.

    Args:
        reward: an adapter; one without a torch module (a callable) is left alone.
        how: False for nothing, True for torch's default backend, or a backend's name ("inductor", "aot_eager").
    """
    parts = [] if how is False else list(_stateless_parts(getattr(reward, "module", None)))
    backend = "inductor" if how is True else how
    for part in parts:
        part.compile(dynamic=True, backend=backend)
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def _stateless_parts(module: torch.nn.Module | None) -> Iterator[torch.nn.Module]:
    for name, layers in module.named_modules() if isinstance(module, torch.nn.Module) else ():
        if name.rpartition(".")[2] == "layers" and isinstance(layers, torch.nn.ModuleList):
            for layer in layers:
                for child_name, child in layer.named_children():
                    # What the caller has compiled already is left as it is.
                    if "attn" not in child_name and "attention" not in child_name.removeprefix("post_attention"):
                        if child._compiled_call_impl is None:
                            yield child
