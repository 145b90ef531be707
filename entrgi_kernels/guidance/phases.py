"""The denoising loop's phases, as profilers and the benchmarks see them."""

from ..backends.ranges import scope

# In the order of a step; they do not overlap.
PHASES = MODEL, EMBED, REWARD, REWARD_BACKWARD, UPDATE, DRAW, SELECT = (
    "model forward",
    "embed",
    "reward forward",
    "reward backward",
    "update",
    "draw",
    "select",
)

__all__ = ["DRAW", "EMBED", "MODEL", "PHASES", "REWARD", "REWARD_BACKWARD", "SELECT", "UPDATE", "scope"]
