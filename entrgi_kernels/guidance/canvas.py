"""The trajectories of a run, and the slots that a step may fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .keys import candidate_keys


@dataclass
class Canvas:
    """A batch of trajectories.

    Attributes:
        tokens: [R, S] int64, prompts left-padded, then the response with masks where nothing is committed.
        attention: [R, S] bool, False on padding.
        start: first response slot; the response is ``tokens[:, start:]``, L slots.
        masked: [R, L] bool, the slots still to be filled. Kept apart from the tokens: a prompt may hold the mask token.
        keys: [R, L] int64, keys of each slot's draws.
        repeats: this many consecutive trajectories start out identical (K samples of a prompt); 1 claims nothing.
        ends: [R] int64, the slot at which what the reward reads of each response ends; None is `end` for all.
        end: the slot at which the suffix stands for the reward; slots between are dead. None is L.
    """

    tokens: torch.Tensor
    attention: torch.Tensor
    start: int
    masked: torch.Tensor
    keys: torch.Tensor
    repeats: int = 1
    ends: torch.Tensor | None = None
    end: int | None = None

    @classmethod
    def blank(
        cls,
        prompts: torch.Tensor,
        attention: torch.Tensor,
        mask_token_id: int,
        keys: torch.Tensor,
        repeats: int = 1,
    ) -> Canvas:
        """Prompts with a response of masks behind each.

        Args:
            prompts: [P, A] int64, left-padded.
            attention: [P, A] bool, False on padding.
            mask_token_id: fills the response.
            keys: [R, L] int64 on the device of the run; R / P consecutive trajectories for each prompt.
            repeats: see the class.
        """
        count, slots = keys.shape
        samples = count // max(1, len(prompts))

        def rows(prompt: torch.Tensor, filler: int | bool) -> torch.Tensor:
            whole = torch.nn.functional.pad(prompt, (0, slots), value=filler)
            return whole.repeat_interleave(samples, dim=0).to(keys.device)

        return cls(
            tokens=rows(prompts, mask_token_id),
            attention=rows(attention, True),
            start=prompts.shape[1],
            masked=torch.ones(count, slots, dtype=torch.bool, device=keys.device),
            keys=keys,
            repeats=repeats,
        )

    def copied(self, count: int) -> Canvas:
        """A canvas with `count` rows for each, all of them alike but for their keys."""
        rows = {name: getattr(self, name).repeat_interleave(count, dim=0) for name in ("tokens", "attention", "masked")}
        return Canvas(**rows, start=self.start, keys=candidate_keys(self.keys, count), repeats=self.repeats * count)

    @property
    def response(self) -> torch.Tensor:
        """[R, L] view of the response's tokens."""
        return self.tokens[:, self.start :]

    def read_by_reward(self, tokens: torch.Tensor, filler: int | bool) -> torch.Tensor:
        """What the reward reads of [R, L] columns over the response: up to the ends, fillers behind a row's own."""
        shown = tokens[:, : self.end]
        if self.ends is None:
            return shown
        return shown.masked_fill(torch.arange(shown.shape[1], device=shown.device) >= self.ends[:, None], filler)


@dataclass
class OpenSlots:
    """The masked slots of one denoising step, row-major: row i of phi belongs to slot (rows[i], slots[i]).

    Attributes:
        rows, slots, keys: [N] int64, trajectory, response slot and random key of each.
        counts: open slots of each trajectory.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    keys: torch.Tensor
    counts: list[int]

    @classmethod
    def of(cls, masked: torch.Tensor, keys: torch.Tensor, counts: list[int]) -> OpenSlots:
        """The open slots of [R, L] ``masked``; their numbers being known, nothing waits for the device."""
        width = masked.shape[1]
        # A stable sort puts the open slots first and leaves them in order.
        flat = (~masked).flatten().to(torch.uint8).argsort(stable=True)[: sum(counts)]
        rows, slots = flat // width, flat % width
        return cls(rows, slots, keys[rows, slots], counts)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def leaders(self, repeats: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where every `repeats` trajectories in a row have the same open slots: which rows of phi are enough.

        Returns:
            (the rows of phi of the first of each group, int64 [n]; which of these n each row of phi equals, [N]).
        """
        leaders: list[int] = []
        source: list[int] = []
        begin = 0
        for count in self.counts[::repeats]:
            source += list(range(len(leaders), len(leaders) + count)) * repeats
            leaders += range(begin, begin + count)
            begin += count * repeats
        return on_device(leaders, self.rows.device), on_device(source, self.rows.device)

    def permuted(self, ancestors: Sequence[int], keys: torch.Tensor) -> tuple[OpenSlots, torch.Tensor]:
        """The open slots of trajectories that are copies of others, and of which row of phi each is a copy, int64 [N'].

        Args:
            ancestors: for each trajectory, the one that it is a copy of; host numbers.
            keys: [R, L], each trajectory's own.
        """
        begins = [0]
        for count in self.counts:
            begins.append(begins[-1] + count)
        source = [row for one in ancestors for row in range(begins[one], begins[one + 1])]
        rows = [place for place, one in enumerate(ancestors) for _ in range(self.counts[one])]
        index, here = on_device(source, self.rows.device), on_device(rows, self.rows.device)
        slots = self.slots[index]
        return OpenSlots(here, slots, keys[here, slots], [self.counts[one] for one in ancestors]), index

    def index_of_slot(self, masked: torch.Tensor) -> torch.Tensor:
        """[R, L] int64: the row of phi that belongs to a slot, -1 where it is not open."""
        index = torch.full(masked.shape, -1, device=masked.device)
        index[self.rows, self.slots] = torch.arange(len(self), device=masked.device)
        return index


def on_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Tensor of some numbers; from pinned memory, since a copy from any other is waited for."""
    tensor = torch.tensor(numbers, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def left_padded(prompts: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of different lengths as ([P, A] int64, [P, A] bool, False on padding), on the CPU."""
    width = max(map(len, prompts), default=0)
    tokens = [[filler] * (width - len(ids)) + list(ids) for ids in prompts]
    real = [[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts]
    shape = len(prompts), width
    return torch.tensor(tokens, dtype=torch.int64).view(shape), torch.tensor(real, dtype=torch.bool).view(shape)
