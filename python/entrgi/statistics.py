"""Means over prompts, their standard errors, and differences paired over prompts.

The prompt is the unit of replication: K samples of one prompt share it, so they are reduced to one number (their best,
their mean) before anything here is called. A standard error is the sample deviation (n - 1) over sqrt(n).

None, NaN and infinities are no number but say that there is none: a reward or a score is missing. They never are the
best and are left out of every mean; whoever prints a figure says how many there were.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over ``n`` prompts, those that have a value.

    ``error`` is None where one prompt gives none; the mean is NaN where there is no prompt.
    """

    mean: float
    error: float | None
    n: int

    def __str__(self) -> str:
        return self._text(".2f")

    def signed(self) -> str:
        """The same with a leading sign, for differences."""
        return self._text("+.2f")

    def _text(self, form: str) -> str:
        if not self.n:
            return "–"
        return f"{self.mean:{form}}" if self.error is None else f"{self.mean:{form}} ± {self.error:.2f}"

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-safe fields: a value that is not finite becomes None."""
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        return {"mean": self.mean if math.isfinite(self.mean) else None, "error": error, "n": self.n}


def number(value: float | None) -> float | None:
    """The value where it is a finite number, else None."""
    return float(value) if value is not None and math.isfinite(value) else None


def finite(values: Iterable[float | None]) -> list[float]:
    """Those of the values that are finite numbers."""
    return [value for value in map(number, values) if value is not None]


def estimate(values: Sequence[float | None]) -> Estimate:
    """Mean and standard error of one number per prompt, over the prompts that have one.

    Args:
        values: of every prompt, at least one.

    Raises:
        ValueError: when there are no prompts.
    """
    if len(values) == 0:
        raise ValueError("a mean needs at least one value, got none")
    values = finite(values)
    n = len(values)
    if n == 0:
        return Estimate(math.nan, None, 0)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)


def paired_difference(values: Sequence[float | None], baseline: Sequence[float | None]) -> Estimate:
    """Mean and standard error of ``values[i] - baseline[i]``, prompt by prompt, over the prompts that have both.

    Raises:
        ValueError: when the two differ in length or are empty.
    """
    if len(values) != len(baseline):
        raise ValueError(f"paired values must come from the same prompts, got {len(values)} and {len(baseline)}")
    pairs = [(number(a), number(b)) for a, b in zip(values, baseline, strict=True)]
    return estimate([None if a is None or b is None else a - b for a, b in pairs])


def bootstrap_interval(
    values: Sequence[float | None], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Bias-corrected, accelerated bootstrap interval of the mean of one number per prompt (or paired difference).

    The resampled prompts depend on the seed and the number of prompts alone: for every method they are the same ones.

    Args:
        values: one number per prompt.
        level: coverage.
        resamples: how often the prompts are drawn again.
        seed: of those draws.

    Returns:
        (low, high); None for fewer than two prompts that have a value.
    """
    return _interval(tuple(finite(values)), level, resamples, seed)


@functools.lru_cache(maxsize=4096)  # reports show one figure in several places and forms
def _interval(values: tuple[float, ...], level: float, resamples: int, seed: int) -> tuple[float, float] | None:
    import numpy
    from scipy.stats import bootstrap

    data = numpy.asarray(values)
    if data.size < 2:
        return None
    if numpy.ptp(data) <= 1e-9 * numpy.abs(data).max():  # equal but for rounding: nothing to accelerate by
        return float(data.min()), float(data.max())
    rng = numpy.random.default_rng(seed)
    options = {"confidence_level": level, "n_resamples": resamples, "method": "BCa"}
    interval = bootstrap((data,), numpy.mean, vectorized=True, rng=rng, **options).confidence_interval
    return float(interval.low), float(interval.high)


def best_of(rewards: Sequence[float | None], n: int) -> float:
    """The expected highest of ``n`` of these rewards, drawn without replacement: unbiased for best-of-n.

    A sample whose reward is missing is drawn like any other and never the highest; draws of such samples alone do not
    count.

    Raises:
        ValueError: unless 1 <= n <= len(rewards), or no reward is a finite number.
    """
    k = len(rewards)
    if not 1 <= n <= k:
        raise ValueError(f"best of n={n} needs 1 <= n <= {k}, the number of samples")
    ordered = sorted(finite(rewards))
    if not ordered:
        raise ValueError(f"best of n={n} needs a finite reward, got {list(rewards)}")
    missing = k - len(ordered)  # they rank below all others
    whole = math.comb(k, n) - math.comb(missing, n)
    return math.fsum(r * (math.comb(i, n - 1) / whole) for i, r in enumerate(ordered, start=missing))
