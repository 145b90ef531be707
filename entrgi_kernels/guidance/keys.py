"""Keys of the random draws, so that a result depends on the seed, the prompt and the settings alone.

A row's key is (prompt, sample, response slot), its step (denoising step, inner step): leaving out a row, a step or
another prompt of the batch changes no other draw. The layout is part of docs/philox.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from .config import GuidanceConfig

# To be raised wherever equal settings and seeds no longer give the texts that they gave: other keys, other draws, or
# another use of them. `revision` then says which settings that is about: their results of old are not gone on with.
# 2: searches pass over steps that commit nothing; a trajectory's shares and last step are its own ("even").
REVISION = 2

_SAMPLE_BITS, _SLOT_BITS, _INNER_BITS = 10, 14, 8

RESAMPLING, FINAL_DRAW, POSITIONS = 253, 254, 255


def revision(config: GuidanceConfig) -> int:
    """The last revision of the draws that changed any of these settings' texts; 1 for those of old."""
    searches = config.search != "best"
    # Their plan matters where it is not followed to the letter; whether the model has blocks is not known here.
    by_chance = config.schedule == "even" and (config.alg == "origin" or not config.suppress_undrawable)
    return REVISION if searches or by_chance else 1


def prompt_keys(prompts: Iterable[list[int]], seeds: Sequence[int] | None = None) -> list[int]:
    """A 39-bit key for each prompt: of its token ids, and of how often it came before, so that repeats differ.

    Args:
        prompts: token ids.
        seeds: one a prompt, which then takes the place of the count: equal prompts of equal seeds have equal keys.
    """
    if seeds is not None:
        return [_key(f"seed {seed}:" + ",".join(map(str, ids))) for seed, ids in zip(seeds, prompts, strict=True)]
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for ids in map(tuple, prompts):
        keys.append(_key(",".join(map(str, (seen[ids], *ids)))))
        seen[ids] += 1
    return keys


def _key(content: str) -> int:
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little") >> (64 - 39)


def row_keys(
    prompts: list[int], num_samples: int, slots: int, device: torch.device, first_sample: int = 0
) -> torch.Tensor:
    """int64 [len(prompts) * num_samples, slots]: the keys of every response slot, samples of a prompt contiguous."""
    prompt = torch.tensor(prompts, dtype=torch.int64, device=device).view(-1, 1, 1) << (_SAMPLE_BITS + _SLOT_BITS)
    sample = torch.arange(num_samples, dtype=torch.int64, device=device).view(1, -1, 1) + first_sample << _SLOT_BITS
    slot = torch.arange(slots, dtype=torch.int64, device=device).view(1, 1, -1)
    return (prompt | sample | slot).flatten(0, 1)


def candidate_keys(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Keys [R * count, L] of `count` candidates of every row [R, L]: sample k becomes samples k count and following."""
    sample = keys >> _SLOT_BITS & (1 << _SAMPLE_BITS) - 1
    rows = (keys + (sample * (count - 1) << _SLOT_BITS)).repeat_interleave(count, dim=0)
    number = torch.arange(count, device=keys.device).repeat(len(keys))
    return rows + (number[:, None] << _SLOT_BITS)


def draw_counter(denoising_step: int, inner: int) -> int:
    """The 32-bit step of a draw: `inner` is the inner step, RESAMPLING, FINAL_DRAW or POSITIONS."""
    return denoising_step << _INNER_BITS | inner
