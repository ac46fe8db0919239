"""Means over steps or batches, and whether they are surely above or below a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flatwise.measure.result import digits

SURE = 2.0
"""Standard errors by which something must hold."""


@dataclass(frozen=True)
class Mean:
    """A mean over steps or batches.

    Attributes:
        value: the mean; NaN where nothing was seen.
        error: its standard error; NaN where there was one value or none.
    """

    value: float
    error: float

    def __str__(self) -> str:
        """Write it with no more digits than it has."""
        return digits(self.value, self.error)

    def above(self, bound: float) -> bool:
        """Tell whether it is above a bound by more than chance.

        Args:
            bound: the bound.

        Returns:
            Whether the value is :data:`SURE` standard errors above it.
        """
        return self.value - SURE * (0.0 if math.isnan(self.error) else self.error) > bound

    def below(self, bound: float) -> bool:
        """Tell whether it is below a bound by more than chance.

        Args:
            bound: the bound.

        Returns:
            Whether the value is :data:`SURE` standard errors below it.
        """
        return self.value + SURE * (0.0 if math.isnan(self.error) else self.error) < bound


def mean_of(values: list[float]) -> Mean:
    """Average.

    Args:
        values: NaN are left out.

    Returns:
        The mean and its standard error.
    """
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return Mean(math.nan, math.nan)
    mean = sum(kept) / len(kept)
    if len(kept) < 2 or not math.isfinite(mean):
        return Mean(mean, math.nan)
    return Mean(mean, math.sqrt(sum((v - mean) ** 2 for v in kept) / (len(kept) - 1) / len(kept)))


def percent(share: float) -> str:
    """Write a share in percent.

    Args:
        share: 0.5 is a half.

    Returns:
        Three digits, never a power of ten where the number is large.
    """
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 1000 else f"{value:.3g} %"
