"""Training methods and their published settings. Needs no torch: the command line reads the names here."""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """What a training method is made of: how completions are drawn, what is minimised, and its published settings."""

    guidance: str
    objective: str
    p_mask_prompt: float
    num_iterations: int


METHODS = {
    "rgrl-entrgi": Method("entrgi", "rgrl", 0.3, 1),
    "rgrl-aps": Method("aps", "rgrl", 0.3, 1),
    "diffu-grpo": Method("none", "grpo", 0.15, 12),
}
WEIGHTINGS = ("uniform", "softmax", "best")  # of a prompt's completions, under RGRL
