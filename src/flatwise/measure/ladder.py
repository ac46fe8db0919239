"""Looking for the largest radius that costs next to nothing: a ladder, a bracket, an interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable

from flatwise.measure.agreement import Reading

BORNE = 0.05
"""Share of the descent on other samples that a radius may cost: as much as the probe itself costs at most."""
LEAST_COSINE = math.sqrt(0.5)
"""Between a batch's gradient and the direction that is made from it: half of the direction's squared length is along
the batch's own gradient. Below, most of it comes from the curvature on the way, of which SAM's first-order model knows
nothing."""
LADDER = 4.0
"""Factor between radii until one is harmless and one is not."""


def search(read: Callable[[float], Reading], start: float, count: int) -> list[Reading]:
    """Look for the largest radius that is harmless: climb a ladder, then halve the bracket on a logarithmic scale.

    Args:
        read: measures a radius.
        start: where to begin.
        count: how many radii to measure.

    Returns:
        The readings, in the order in which they were made.
    """
    found: list[Reading] = []
    low = high = math.nan
    rho = start
    for _ in range(count):
        reading = read(rho)
        found.append(reading)
        low, high = (rho, high) if reading.harmless else (low, rho)
        if math.isnan(high):
            rho *= LADDER
        elif math.isnan(low):
            rho /= LADDER
        else:
            rho = math.sqrt(low * high)
    return found


def chosen(found: list[Reading]) -> tuple[float, str, list[str]]:
    """Choose the radius: where the first bound is crossed, between the last harmless reading and the first other one.

    Args:
        found: the readings.

    Returns:
        The radius, the reason, and notes.
    """
    good = [reading for reading in found if reading.harmless]
    bad = [reading for reading in found if not reading.harmless]
    if not good:
        least = min(bad, key=lambda reading: reading.rho)
        return (
            _rounded(least.rho / LADDER),
            "every radius that was tried costs more than it may: this is below the smallest of them",
            ["SAM may not help here: compare it with the base optimizer (flatwise compare)"],
        )
    best = max(good, key=lambda reading: reading.rho)
    above = [reading for reading in bad if reading.rho > best.rho]
    reason = (
        f"the largest radius at which a step leads down on other samples at least {1 - BORNE:.0%} as well as the "
        f"base's, and at least half of which is along the batch's own gradient (cosine {LEAST_COSINE:.2f})"
    )
    if not above:
        return _rounded(best.rho), "the largest radius that was tried; none cost too much", []
    first = min(above, key=lambda reading: reading.rho)
    crossings = []
    for low, high in (
        (best.margin.value, first.margin.value),
        (best.cosine.value - LEAST_COSINE, first.cosine.value - LEAST_COSINE),
    ):
        if high < 0 <= low:
            crossings.append(low / (low - high))
    place = min(crossings, default=0.0)  # none: the first one is not finite
    return _rounded(best.rho * (first.rho / best.rho) ** place), reason, []


def _rounded(rho: float) -> float:
    return float(f"{rho:.2g}")
