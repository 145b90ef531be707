"""Means over prompts, their standard errors, and differences paired over prompts.

The prompt is the unit of replication: K samples of one prompt share it, so they are reduced to one number (their best,
their mean) before anything here is called. A standard error is the sample deviation (n - 1) over sqrt(n).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over ``n`` prompts. ``error`` is None where one prompt gives none."""

    mean: float
    error: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.error is None else f"{self.mean:.2f} ± {self.error:.2f}"

    def signed(self) -> str:
        """The same with a leading sign, for differences."""
        return f"{self.mean:+.2f}" if self.error is None else f"{self.mean:+.2f} ± {self.error:.2f}"

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-safe fields: a value that is not finite becomes None."""
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        return {"mean": self.mean if math.isfinite(self.mean) else None, "error": error, "n": self.n}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of one number per prompt.

    Args:
        values: one number per prompt, at least one.

    Raises:
        ValueError: when there are no values.
    """
    values = [float(value) for value in values]
    n = len(values)
    if n == 0:
        raise ValueError("a mean needs at least one value, got none")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean and standard error of ``values[i] - baseline[i]``, prompt by prompt.

    Raises:
        ValueError: when the two differ in length or are empty.
    """
    if len(values) != len(baseline):
        raise ValueError(f"paired values must come from the same prompts, got {len(values)} and {len(baseline)}")
    return estimate([float(a) - float(b) for a, b in zip(values, baseline, strict=True)])
