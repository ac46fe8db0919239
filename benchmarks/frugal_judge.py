"""The judgement of ``frugal.py``: gains over the base with intervals, and the share of SAM's gain that is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flatwise.lab.statistics import LEVEL, Estimate, estimate, paired_difference
from frugal_contestants import SAMS
from frugal_records import Record

Scores = Mapping[int, float]
LEAST = 2
"""Seeds without which there is no interval."""
NARROWEST = 1e-4
"""Of 360 test images each of a few seeds may lose exactly one: such an interval has no width and says nothing."""


@dataclass(frozen=True)
class Gain:
    """A contestant minus the base, over the seeds that both have.

    Attributes:
        difference: mean and 95 % interval.
        seeds: how many.
    """

    difference: Estimate
    seeds: int

    @property
    def verdict(self) -> str:
        """Whether the interval is above 0, below it, or holds it; one without a width is open."""
        width = self.difference.ci95
        if width is None or width < NARROWEST or abs(self.difference.mean) <= width:
            return "open"
        return "better" if self.difference.mean > 0 else "worse"


def gain(scores: Scores, base: Scores) -> Gain | None:
    """Compare a contestant with the base.

    Args:
        scores: by seed.
        base: likewise.

    Returns:
        The gain; None where they share fewer than two seeds.
    """
    shared = sorted(set(scores) & set(base))
    if len(shared) < LEAST:
        return None
    return Gain(paired_difference([scores[s] for s in shared], [base[s] for s in shared]), len(shared))


@dataclass(frozen=True)
class Best:
    """The best SAM of the grid.

    Attributes:
        rho: the radius with the best mean score.
        gain: over the base, from the same seeds that the radius was chosen by, and so too good.
        honest: each seed's gain at the radius that the other seeds choose: not too good, but of a worse choice.
    """

    rho: float
    gain: Gain
    honest: Estimate


def best_of_grid(grid: Mapping[float, Scores], base: Scores) -> Best | None:
    """Choose the radius with the best mean score.

    Args:
        grid: scores by seed for each radius.
        base: by seed.

    Returns:
        The best; None where fewer than two seeds have the base and the whole grid.
    """
    shared = sorted(set(base).intersection(*grid.values()))
    if len(shared) < LEAST:
        return None

    def choose(seeds: Sequence[int]) -> float:
        return max(grid, key=lambda rho: math.fsum(grid[rho][s] for s in seeds))

    rho = choose(shared)
    found = Gain(paired_difference([grid[rho][s] for s in shared], [base[s] for s in shared]), len(shared))
    left_out = [grid[choose([other for other in shared if other != s])][s] - base[s] for s in shared]
    return Best(rho, found, estimate(left_out))


@dataclass(frozen=True)
class Share:
    """How much of a gain is kept.

    Attributes:
        value: the quotient of the means.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


def kept(scores: Scores, best: Scores, base: Scores) -> Share | None:
    """Say which share of the best SAM's gain a contestant keeps, with Fieller's interval.

    A share R is in the interval where the mean of ``a - R b`` over the seeds is not significantly different from 0 (a:
    gains of the contestant, b: of SAM, seed by seed; Student's t). It is finite exactly where SAM's gain is
    significant. SAM's radius is taken as given: that it was chosen as the best of seven by the same seeds is not in it.

    Args:
        scores: of the contestant, by seed.
        best: of the best SAM.
        base: of the base.

    Returns:
        The share; None where SAM's gain is not significantly above 0.
    """
    shared = sorted(set(scores) & set(best) & set(base))
    reference = gain({s: best[s] for s in shared}, base)
    if reference is None or reference.verdict != "better":
        return None
    from scipy.stats import t

    ours, theirs = ([x[s] - base[s] for s in shared] for x in (scores, best))
    count = len(shared)
    mean_a, mean_b = math.fsum(ours) / count, math.fsum(theirs) / count

    def covariance(x: Sequence[float], x_mean: float, y: Sequence[float], y_mean: float) -> float:
        """Of the two means."""
        return math.fsum((u - x_mean) * (v - y_mean) for u, v in zip(x, y, strict=True)) / (count - 1) / count

    square = float(t.ppf(0.5 + LEVEL / 2, count - 1)) ** 2
    # (mean_a - R mean_b)² <= t² var(a - R b) is a quadratic inequality in R.
    leading = mean_b**2 - square * covariance(theirs, mean_b, theirs, mean_b)
    middle = mean_a * mean_b - square * covariance(ours, mean_a, theirs, mean_b)
    last = mean_a**2 - square * covariance(ours, mean_a, ours, mean_a)
    root = math.sqrt(max(0.0, middle**2 - leading * last))
    return Share(mean_a / mean_b, (middle - root) / leading, (middle + root) / leading)


@dataclass(frozen=True)
class Judged:
    """A contestant on a task.

    Attributes:
        gain: over the base.
        share: of the best SAM's gain that is kept; None where SAM has no sure gain.
        time: relative to the base; None where it is not measured.
        memory: peak beyond the base's, in multiples of the weights; likewise.
    """

    gain: Gain
    share: Share | None
    time: float | None
    memory: float | None


@dataclass(frozen=True)
class Judgement:
    """A task.

    Attributes:
        base: the base's score; None where it has not been trained.
        best: SAM's best radius; None where the grid is not whole.
        rows: by contestant; only those who have two seeds in common with the base.
    """

    base: Estimate | None
    best: Best | None
    rows: dict[str, Judged]


def judge(record: Record, contestants: Sequence[str]) -> Judgement:
    """Judge the contestants on a task.

    Args:
        record: of the task.
        contestants: their names.

    Returns:
        The judgement.
    """
    base = record.scores("base")
    grid = {rho: record.scores(name) for rho, name in SAMS.items()}
    best = best_of_grid(grid, base)
    costs = record.content["cost"]
    rows = {}
    for name in contestants:
        scores = record.scores(name)
        found = gain(scores, base)
        if name == "base" or found is None:
            continue
        share = None if best is None else kept(scores, grid[best.rho], base)
        cost = costs.get(name, {})
        rows[name] = Judged(found, share, cost.get("time"), cost.get("memory"))
    return Judgement(estimate(list(base.values())) if base else None, best, rows)
