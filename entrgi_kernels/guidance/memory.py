"""Memory of a run: what it takes once and uses at every step, and an estimate of what a batch will take.

A batch of R trajectories needs beyond the weights about

    N V (phi + Adam's moments) + n V (the committed rows' copies) + max(f(S) R, g(L) R, workspace)

with N = R L open slots, n those a step commits at most, S the length that the diffusion model sees. f, one of its
forwards, and g, the larger of a forward and backward of the reward behind the longest prompt and of the final scoring
of its text, are measured, not assumed: each is run on three short inputs while the memory that its tensors hold is
counted, and the parabola through the three is what a row costs (the square term is there where masks or attention
scores are).
"""

from __future__ import annotations

import functools
import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..backends import resolve
from ..models import DiffusionModel
from ..ops.guidance_update import moment_dtype
from ..rewards.base import reward_gradient
from ..text.template import Conversation
from .schedules import plan

if TYPE_CHECKING:
    from .config import GuidanceConfig
    from .scoring import Scorer

_PROBED = (16, 32, 64)  # lengths at which the models are run
# Of what is free, left for the allocator's rounding and fragments.
_DEFAULT_SHARE = 0.9
# Bytes an entry of phi that an operator's own temporaries take at most: the eager backend makes several float32 copies;
# the others keep to a tenth of phi.
_EAGER_WORKSPACE, _FUSED_WORKSPACE = 24.0, 0.4

# What is kept: the logits, Adam's moments, copies of the rows that a last step moves, the reward's input [R + 1, L, D]
# flat, and what CUDA graphs read at fixed addresses.
Name = Literal[
    "phi", "permuted phi", "exp_avg", "exp_avg_sq", "moved phi", "moved exp_avg", "moved exp_avg_sq", "response",
    "graph rows", "graph slots", "graph keys", "graph rngs",
]  # fmt: skip


class Memory:
    """Named tensors whose memory is kept: asked for again, a name gives a view of the same.

    The number of open slots falls from step to step, so that a run's first step takes what all later ones need. On a
    CPU that spares the page faults of fresh memory, on a GPU it keeps addresses fixed, as CUDA graphs need them.

    Attributes:
        held: the memory of each name, flat.
    """

    def __init__(self) -> None:
        self.held: dict[Name, torch.Tensor] = {}

    def take(self, name: Name, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor with whatever is in it; it holds until the name is asked for again."""
        size = math.prod(shape)
        held = self.held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype or held.device != device:
            self.held[name] = held = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(*shape)

    def holds(self, name: Name, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in this name's memory already, from its beginning."""
        held = self.held.get(name)
        return held is not None and held.data_ptr() == tensor.data_ptr()

    def rows(self, name: Name, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """``source[index]`` in kept memory."""
        out = self.take(name, (index.shape[0], *source.shape[1:]), source.dtype, source.device)
        return torch.index_select(source, 0, index, out=out)


@dataclass(frozen=True)
class Cost:
    """Bytes a row by length: a parabola."""

    constant: float
    linear: float
    square: float

    @classmethod
    def through(cls, lengths: Sequence[int], taken: Sequence[float]) -> Cost:
        """The parabola through three measurements; the line through the last two where it bends the wrong way."""
        (x, y, z), (low, middle, high) = lengths, taken
        first, second = (middle - low) / (y - x), (high - middle) / (z - y)
        square = (second - first) / (z - x)
        if square > 0 and (linear := second - square * (y + z)) >= 0:
            return cls(high - linear * z - square * z * z, linear, square)
        return cls(high - max(0.0, second) * z, max(0.0, second), 0.0)

    def __call__(self, length: int) -> float:
        return max(0.0, self.constant + self.linear * length + self.square * length * length)


@dataclass(frozen=True)
class MemoryEstimate:
    """What a batch takes, in bytes; see the module's text for the formula.

    Attributes:
        forward: of the diffusion model, a row of S positions.
        reward: forward and backward, or final scoring, a row of L response slots.
        vocab_size, slots: V and L.
        logit_bytes, moment_bytes, workspace_bytes: of one entry of phi.
        committed: slots that a trajectory commits in one step at most.
    """

    forward: Cost
    reward: Cost
    vocab_size: int
    slots: int
    logit_bytes: float
    moment_bytes: float
    workspace_bytes: float
    committed: int

    @classmethod
    def measure(
        cls,
        model: DiffusionModel,
        config: GuidanceConfig,
        conversation: Conversation,
        prompt: list[int],
        decode: Callable[[list[int]], str],
        scorer: Callable[[int], Scorer],
        table: torch.Tensor,
    ) -> MemoryEstimate:
        """Run both models on three short inputs each and count.

        Args:
            conversation, prompt: the longest of those to be generated for, and its ids.
            decode: makes a text of ids.
            scorer: the loop's way to ask the reward, for so many rows of that prompt.
            table: [V, D], the reward's embeddings.
        """
        device, rows = model.device, 2
        score_response = scorer(rows)
        reward = score_response.reward
        probed = _PROBED
        if any(getattr(adapter, "position_limit", None) is not None for adapter in (model, reward)):
            longest = max(4, min(probed[-1], config.max_new_tokens))  # learned positions have room for that many
            probed = longest // 4, longest // 2, longest
        forward = []
        for length in probed:
            tokens = torch.full((rows, length), model.mask_token_id, device=device)
            real, wanted = torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
            wanted[:, -1] = True
            forward.append(peak_bytes(functools.partial(model.masked_logits, tokens, real, wanted)) / rows)
        taken: list[float] = []
        for length in probed:
            ids = [prompt[i % len(prompt)] for i in range(length)]
            best, text = torch.tensor([ids] * rows, device=device), decode(ids)

            def score(text=text) -> None:
                reward.score_texts([conversation] * rows, [text] * rows, batch_size=rows)

            def backward(best=best) -> None:
                response = table[best].requires_grad_()
                with torch.enable_grad():
                    reward_gradient(score_response(response, best).sum(), response, "the response's embeddings")

            peak = peak_bytes(score)
            if config.guided:
                if not taken:
                    backward()  # what is made once for a prompt is no part of a row
                peak = max(peak, peak_bytes(backward))
            taken.append(peak / rows)
        size = torch.empty((), dtype=model.dtype).element_size()
        state = moment_dtype(model.dtype, config.state_dtype)
        keeps = config.guided and (config.guidance_steps > 1 or not config.saves("adam_state"))
        engine = resolve(config.backend, torch.empty(0, dtype=model.dtype, device=device)).NAME
        counts = plan(config.schedule, [config.max_new_tokens], config.steps, config.schedule_eps).counts
        return cls(
            forward=Cost.through(probed, forward),
            reward=Cost.through(probed, taken),
            vocab_size=model.vocab_size,
            slots=config.max_new_tokens,
            logit_bytes=size,
            moment_bytes=2 * state.itemsize if keeps else 0,
            workspace_bytes=_EAGER_WORKSPACE if engine == "eager" else _FUSED_WORKSPACE,
            committed=max((row[0] for row in counts), default=0),
        )

    def __call__(self, trajectories: int, prompt_length: int) -> float:
        """Bytes for `trajectories` rows, the longest prompt having `prompt_length` tokens."""
        entries = float(trajectories * self.slots * self.vocab_size)
        moved = float(trajectories * self.committed * self.vocab_size)
        held = entries * (self.logit_bytes + self.moment_bytes) + moved * (self.logit_bytes + self.moment_bytes)
        passing = (
            trajectories * self.forward(prompt_length + self.slots),
            trajectories * self.reward(self.slots),
            entries * self.workspace_bytes,
        )
        return held + max(passing)


def memory_budget(given: float | int | None, device: torch.device) -> float:
    """Bytes that a run may take: `given` where it is a number of bytes, else a share of what is free."""
    if isinstance(given, int):
        return float(given)
    return (given or _DEFAULT_SHARE) * free_memory(device)


def free_memory(device: torch.device) -> float:
    """Bytes that can be taken: of the GPU, what it has free and what torch holds unused; of the machine otherwise."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    try:
        with open("/proc/meminfo") as lines:
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that tensors made by a call hold at once; what its operators take inside of them is not seen."""
    with LiveMemory() as memory:
        run()
    return memory.peak


class LiveMemory(TorchDispatchMode):
    """Follows the memory of all tensors made while it is active, on any device.

    Attributes:
        live, peak: bytes they hold now, and held at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self._known.add(value.untyped_storage())  # was there before
        out = func(*args, **kwargs or {})
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size
