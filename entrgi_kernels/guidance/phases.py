"""Phases of the denoising loop, as :mod:`..backends.ranges` tells its listeners of them. They do not overlap."""

from __future__ import annotations

from ..backends.ranges import scope as scope

# In the order of a step.
PHASES = MODEL, EMBED, REWARD, REWARD_BACKWARD, UPDATE, DRAW, SELECT = (
    "model forward",
    "embed",
    "reward forward",
    "reward backward",
    "update",
    "draw",
    "select",
)
