"""Memory of a run: what it takes once and uses at every step, and an estimate of what a batch will take.

A batch of R trajectories needs beyond the weights about

    N V (phi + Adam's moments) + n V (the committed rows' copies)
    + max(P o(S), R f(S), k(S) R + max(g(L) R, h N, workspace))

with P prompts, N = R B open slots (B those of a block; without blocks L), n those a step commits at most, S the length
that the diffusion model sees. What is measured, not assumed: f, a block's forwards with the keys and values that they
keep, of which k is left between them; o, the first forward of a prompt, which its samples share; h, what a forward
holds of an open slot's logits beside phi; and g, the larger of a forward and backward of the reward behind the longest
prompt and of the final scoring of its text. Each is run on three short inputs while the memory that its tensors hold is
counted, and the parabola through the three is what a row costs (the square term is there where masks or attention
scores are).
"""

from __future__ import annotations

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
from ..models.forwards import Forwards
from ..names import METHODS
from ..ops.guidance_update import moment_dtype
from ..rewards.base import reward_gradient
from ..text.template import Conversation
from .canvas import Canvas
from .schedules import plan, steps_of_block

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
        """The parabola through three measurements; the line through the last two where it bends the wrong way.

        Of fewer than three the last counts, in proportion to the length.
        """
        if len(lengths) < 3:
            return cls(0.0, taken[-1] / lengths[-1], 0.0)
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
        opening: the first forward of a prompt, S positions.
        forward: of the diffusion model, a row of S positions: a block's forwards, with what is kept between them.
        kept: what is left of a row of S positions between its forwards.
        head_bytes: of one entry of phi, what a forward holds of it elsewhere.
        reward: forward and backward, or final scoring, a row of L response slots.
        vocab_size, slots, open_slots: V, L and B.
        logit_bytes, moment_bytes, workspace_bytes: of one entry of phi.
        committed: slots that a trajectory commits in one step at most.
        sharing: trajectories that share a prompt's first forward.
    """

    opening: Cost
    forward: Cost
    kept: Cost
    head_bytes: float
    reward: Cost
    vocab_size: int
    slots: int
    open_slots: int
    logit_bytes: float
    moment_bytes: float
    workspace_bytes: float
    committed: int
    sharing: int

    @classmethod
    def measure(
        cls,
        model: DiffusionModel,
        forwards: Callable[[Canvas, int], Forwards],
        block_length: int | None,
        config: GuidanceConfig,
        conversation: Conversation,
        prompt: list[int],
        decode: Callable[[list[int]], str],
        scorer: Callable[[int], Scorer],
        table: torch.Tensor,
    ) -> MemoryEstimate:
        """Run both models on three short inputs each and count.

        Args:
            model: the diffusion model's adapter.
            forwards: the loop's way to ask it, for a canvas by blocks of a length.
            block_length: of the run; None without blocks.
            config: settings.
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
        open_slots, own = block_length or config.max_new_tokens, getattr(model, "block_length", None)
        block, canvases = max(1, min(open_slots, probed[0] // 4)), probed
        if own is not None:  # whole blocks: two behind a prompt, or as many as there are positions for
            least, limit = -(-probed[0] // own), getattr(model, "position_limit", None)
            counts: tuple[int, ...] = (2 + least, 2 + 2 * least, 2 + 4 * least)
            counts = counts if limit is None else tuple(n for n in (1, 2, 3) if n * own <= limit)
            block, canvases = own, tuple(own * count for count in counts)
        probes = [_Probe.of(model, forwards, rows, length, block) for length in canvases]
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
        keeps = config.guided and METHODS[config.method].adam
        keeps &= config.inner_steps > 1 or not config.saves("adam_state")
        engine = resolve(config.backend, torch.empty(0, dtype=model.dtype, device=device)).NAME
        blocks = config.max_new_tokens // open_slots
        steps = {steps_of_block(config.steps, number, blocks)[1] for number in range(blocks)}
        plans = [plan(config.schedule, [open_slots], count, config.schedule_eps).counts for count in steps]
        starts = [max(block, length - block) for length in canvases]
        return cls(
            opening=Cost.through(starts, [probe.opening for probe in probes]) if own else Cost(0.0, 0.0, 0.0),
            forward=Cost.through(canvases, [probe.forward for probe in probes]),
            kept=Cost.through(canvases, [probe.kept for probe in probes]),
            head_bytes=probes[0].head / model.vocab_size,
            reward=Cost.through(probed, taken),
            vocab_size=model.vocab_size,
            slots=config.max_new_tokens,
            open_slots=open_slots,
            logit_bytes=size,
            moment_bytes=2 * state.itemsize if keeps else 0,
            workspace_bytes=_EAGER_WORKSPACE if engine == "eager" else _FUSED_WORKSPACE,
            committed=max((row[0] for counts in plans for row in counts), default=0),
            sharing=config.num_samples * config.copies,
        )

    def __call__(self, trajectories: int, prompt_length: int) -> float:
        """Bytes for `trajectories` rows, the longest prompt having `prompt_length` tokens."""
        open_slots = trajectories * self.open_slots
        entries = float(open_slots * self.vocab_size)
        moved = float(trajectories * self.committed * self.vocab_size)
        held = entries * (self.logit_bytes + self.moment_bytes) + moved * (self.logit_bytes + self.moment_bytes)
        length, prompts = prompt_length + self.slots, -(-trajectories // self.sharing)
        beside = trajectories * self.reward(self.slots), entries * self.head_bytes, entries * self.workspace_bytes
        passing = (
            prompts * self.opening(prompt_length + self.open_slots),
            trajectories * self.forward(length),
            trajectories * self.kept(length) + max(beside),
        )
        return held + max(passing)


@dataclass(frozen=True)
class _Probe:
    """Bytes a row that forwards take on a short canvas; see :class:`MemoryEstimate`. `head` is of one slot's logits."""

    opening: float
    forward: float
    kept: float
    head: float

    @classmethod
    def of(
        cls, model: DiffusionModel, forwards: Callable[[Canvas, int], Forwards], rows: int, length: int, block: int
    ) -> _Probe:
        """Of a canvas of so many columns, whose last two blocks are opened (its only one, where it has no more)."""
        start, device = max(0, length - 2 * block), model.device
        tokens = torch.full((rows, length), model.mask_token_id, device=device)
        real, keys = torch.ones_like(tokens, dtype=torch.bool), tokens[:, start:]
        canvas = Canvas(tokens, real, start, real[:, start:], keys)
        outs = [torch.empty(rows * count, model.vocab_size, dtype=model.dtype, device=device) for count in (1, block)]
        with LiveMemory() as memory:
            made = forwards(canvas, block)

            def peak(begin: int | None, slots: int) -> float:
                memory.peak = memory.live
                if begin is not None:
                    made.open(tokens, torch.full_like(tokens[:, 0], begin))
                end = length if begin is None else begin + block
                masked = torch.zeros_like(real)
                masked[:, end - slots : end] = True
                made.masked_logits(tokens, masked, out=outs[slots > 1])
                return memory.peak / rows

            opening = peak(start, 1)
            first, one = peak(length - block, 1), peak(None, 1)
            kept = memory.live / rows
            head = max(0.0, peak(None, block) - one) / max(1, block - 1)
        return cls(opening, max(first, one), kept, head)


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
