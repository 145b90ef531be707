"""Interpolation weights: the hard token's share as a function of the row's entropy.

The method is linear, w = H / log V: uncertain positions lean on a hard token, confident ones stay soft. The others
exist for ablation. To add one, write a class with ``__call__(entropy, V)`` and enter it in `WEIGHTS`.

Source: arXiv 2602.05000; one public commentary states the weight the other way round, while the paper, its project page
and its code agree on this form.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..names import METHODS, WEIGHT_MODES

WeightFunction = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class ThresholdWeight:
    """w = clamp((H - theta) / width, 0, 1), rising with the entropy.

    Attributes:
        theta: entropy in nats below which the weight is 0.
        width: nats over which it rises to 1; > 0.
    """

    theta: float = 1.0
    width: float = 1.0

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ValueError(f"width={self.width}: expected a number of nats > 0 (for a jump use the weight 'step')")

    def __call__(self, entropy: torch.Tensor, vocab_size: int) -> torch.Tensor:
        return ((entropy - self.theta) / self.width).clamp(0, 1)


@dataclass(frozen=True)
class StepWeight:
    """w = 1 where H >= theta, else 0.

    Attributes:
        theta: entropy in nats at which the hard token takes over.
    """

    theta: float = 1.0

    def __call__(self, entropy: torch.Tensor, vocab_size: int) -> torch.Tensor:
        # A NaN entropy (a bad row) has to stay NaN: a comparison would hide it.
        return torch.where(entropy.isnan(), entropy, (entropy >= self.theta).to(entropy.dtype))


# Name -> the operators' own mode, or a class whose arguments may follow the name, as in "threshold(0.5, 1.0)".
WEIGHTS: dict[str, str | type] = {
    "linear": "entropy",
    **{mode: mode for mode in WEIGHT_MODES},
    "threshold": ThresholdWeight,
    "step": StepWeight,
}

_CALL = re.compile(r"^\s*(\w+)\s*(?:\(([^()]*)\)\s*)?$")  # two runs of spaces in a row would be quadratic


def resolve_weight(weight: str | WeightFunction) -> str | WeightFunction:
    """The operators' form of a weight: one of their modes, or a callable of (entropy [N] in nats, V).

    Args:
        weight: a name, with numbers in parentheses where it takes any ("step(0.5)"), or a callable.

    Raises:
        ValueError: no such weight, or arguments that it does not take.
        TypeError: neither a name nor a callable.
    """
    if not isinstance(weight, str):
        if not callable(weight):
            raise TypeError(f"weight is {type(weight).__name__}: expected a weight's name or a callable")
        return weight
    match = _CALL.match(weight)
    found = WEIGHTS.get(match.group(1)) if match else None
    if match is None or found is None:
        raise ValueError(f"weight={weight!r}: expected a callable or one of {', '.join(map(repr, WEIGHTS))}")
    try:
        numbers = [float(number) for number in (match.group(2) or "").split(",") if number.strip()]
    except ValueError:
        raise ValueError(f"weight={weight!r}: expected numbers in parentheses, as in 'threshold(1.0, 0.5)'") from None
    try:
        if isinstance(found, type):
            return found(*numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"weight={weight!r}: {error}") from error
    if numbers:
        raise ValueError(f"weight={weight!r}: the weight {match.group(1)!r} takes no numbers")
    return found


def method_weight(method: str, weight: str | WeightFunction | None = None) -> str | WeightFunction | None:
    """The weight a method uses, in the operators' form; None for no guidance.

    Args:
        method: a name out of :data:`entrgi_kernels.names.METHODS`.
        weight: replaces the method's own weight; only "entrgi" takes one, since it is what the others are named after.

    Raises:
        ValueError: no such method, or a weight for a method that fixes its own.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(map(repr, METHODS))}")
    if weight is not None and method != "entrgi":
        raise ValueError(f"weight={weight!r} with method={method!r}: only method 'entrgi' takes another weight")
    own = METHODS[method].weight
    return None if own is None else resolve_weight(own if weight is None else weight)
