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

from .buffers import Buffers
from .canvas import Canvas, OpenSlots
from .config import GuidanceConfig
from .inner import Guided, InnerLoop
from .keys import step_key

SLOTS = 8  # rows of phi are padded to a multiple of this, a trajectory: one graph serves so many steps

# Runs a function so that it can be repeated: (its result, whose tensors every repetition fills again, the repetition).
Capture = Callable[[Callable[[], Guided]], "tuple[Guided, Callable[[], None]]"]


def cuda_capture(run: Callable[[], Guided]) -> tuple[Guided, Callable[[], None]]:
    """Capture what a function launches in a CUDA graph; nothing is computed yet.

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
        buffers: the batch's memory; phi must lie in its "phi", see :meth:`padded`.
        trajectories: R.
        capture: how; :func:`cuda_capture`, but for tests.
    """

    def __init__(
        self,
        loop: InnerLoop,
        config: GuidanceConfig,
        buffers: Buffers,
        trajectories: int,
        capture: Capture = cuda_capture,
    ) -> None:
        self._loop, self._config, self._buffers, self._capture = loop, config, buffers, capture
        self._multiple, self._trajectories = SLOTS * trajectories, trajectories
        self._key: tuple[int, bool] | None = None
        self._replay: Callable[[], None] | None = None
        self._guided: Guided | None = None

    @property
    def length(self) -> int:
        """M."""
        return self._loop.length

    def padded(self, rows: int) -> int:
        """How many rows of phi are kept for that many open slots."""
        return -(-rows // self._multiple) * self._multiple

    def __call__(
        self, phi: torch.Tensor, opened: OpenSlots, canvas: Canvas, step: int, settled: int | None, defer: bool
    ) -> Guided:
        """As the loop's own call; the result holds until the next."""
        key = self.padded(len(opened)), defer
        fixed = self._inputs(phi, opened, step, key[0])
        arguments: tuple[Any, ...] = (*fixed[:4], canvas.response, fixed[4], None, defer)
        if key != self._key:  # the number of open slots only falls: a size left behind does not come back
            self._key, self._replay, self._guided = key, None, None
            return self._own(self._loop.run(*arguments), len(opened))
        if self._replay is None:
            self._guided, self._replay = self._capture(lambda: self._loop.run(*arguments))
        self._replay()
        assert self._guided is not None
        return self._own(self._guided, len(opened))

    def _inputs(self, phi: torch.Tensor, opened: OpenSlots, step: int, size: int) -> tuple[torch.Tensor, ...]:
        """(phi, rows, slots, keys, rngs) at fixed addresses, padded."""
        count, device, take = len(opened), phi.device, self._buffers.take
        whole = take("phi", (size, phi.shape[1]), phi.dtype, device)
        if whole.data_ptr() != phi.data_ptr():
            whole[:count].copy_(phi)
        whole[count:].zero_()
        columns = []
        for name, column, filler in (
            ("rows", opened.rows, self._trajectories),
            ("slots", opened.slots, 0),
            ("keys", opened.keys, 0),
        ):
            fixed = take(f"graph {name}", (size,), torch.int64, device)
            fixed[:count].copy_(column)
            fixed[count:].fill_(filler)
            columns.append(fixed)
        rngs = take("graph rngs", (self.length, 2), torch.int64, device)
        rngs[:, 0].fill_(self._config.seed)
        rngs[:, 1].copy_(torch.arange(self.length, device=device) + step_key(step, 0))
        return (whole, *columns, rngs)

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
