"""Means with their 95 % confidence intervals over seeds, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and how well it is known.

    Attributes:
        per_seed: one value a seed.
        mean: their mean.
        ci95: half the width of the 95 % confidence interval (Student's t); None where there is one seed.
    """

    per_seed: list[float]
    mean: float
    ci95: float | None

    def as_dict(self) -> dict[str, Any]:
        """Give the fields by name, for ``results.json``.

        Returns:
            The fields.
        """
        return asdict(self)


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate a mean, taking the values as independent draws from one normal distribution.

    Args:
        values: one a seed, at least one.

    Returns:
        The mean and its interval: mean ± t(0.975, n - 1) s / sqrt(n).
    """
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(list(values), mean, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = float(t.ppf(0.5 + LEVEL / 2, count - 1))
    return Estimate(list(values), mean, quantile * deviation / math.sqrt(count))


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Estimate the mean difference of two methods that ran from the same seeds.

    Args:
        values: one a seed.
        reference: the other method's, seed by seed.

    Returns:
        The mean of the differences and its interval, which the seeds' common ups and downs do not widen.
    """
    return estimate([value - other for value, other in zip(values, reference, strict=True)])
