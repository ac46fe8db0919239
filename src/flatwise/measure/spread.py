"""How far a mean may be off: standard errors over parts of the data, over draws, and over both.

The parts are taken as clusters of samples drawn independently of each other, such as the batches of a shuffled loader.
A gap ``L_b(w + eps) - L_b(w)`` is taken part by part, so what parts differ in at w itself does not enter its error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatwise.measure.problem import Problem


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error.

    Attributes:
        value: the mean.
        standard_error: None where there is a single cluster, from which none can be told.
        over: what the error is over, such as ``"8 parts"``; empty without one.
    """

    value: float
    standard_error: float | None
    over: str


def weighted(problem: Problem, values: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, int]:
    """Average over clusters of unequal size, which the processes hold together.

    With shares s_b of the samples, the mean is ``sum_b s_b v_b`` and its variance is estimated by
    ``B / (B - 1) sum_b s_b^2 (v_b - mean)^2``, which for equal shares is the sample variance divided by B.

    Args:
        problem: whose processes hold the clusters.
        values: shape (rows, clusters of this process), float64, on the CPU.
        samples: in each cluster, shape (clusters of this process).

    Returns:
        Means and variances, shape (rows,), NaN where there is one cluster; and the number B of clusters.
    """
    samples = samples.double()
    counts = torch.tensor([float(samples.sum()), float(len(samples))], dtype=torch.float64)
    sums = torch.cat([values @ samples, counts])
    sums = problem.summed(sums.to(problem.device)).cpu()
    total, clusters = float(sums[-2]), int(sums[-1])
    means = sums[:-2] / total
    squares = ((values - means[:, None]) * (samples / total)).square().sum(1)
    squares = problem.summed(squares.to(problem.device)).cpu()
    return means, squares * (clusters / (clusters - 1) if clusters > 1 else math.nan), clusters


def over_clusters(problem: Problem, values: Tensor, samples: Tensor, clusters: str) -> Estimate:
    """Average one number for each cluster.

    Args:
        problem: whose processes hold the clusters.
        values: shape (clusters of this process,), float64.
        samples: in each cluster, same shape.
        clusters: what they are called.

    Returns:
        The mean, and its standard error over the clusters.
    """
    means, variances, number = weighted(problem, values[None], samples)
    if number < 2:
        return Estimate(float(means), None, "")
    return Estimate(float(means), math.sqrt(float(variances)), f"{number} {clusters}")


def over_parts(problem: Problem, values: Tensor) -> Estimate:
    """Average one number for each part of the data.

    Args:
        problem: the parts.
        values: shape (parts,), float64.

    Returns:
        The mean over the samples, and its standard error over the parts.
    """
    return over_clusters(problem, values, _sizes(problem), "parts")


def over_draws_and_parts(problem: Problem, values: Tensor, draws: str) -> tuple[Estimate, float, float | None]:
    """Average over random draws and parts, where every draw met every part.

    The variance is that of two crossed factors: over draws, plus over parts, minus that of their interaction, which
    both contain (Cameron, Gelbach and Miller, 2011, for clusters in two ways); never less than either.

    Args:
        problem: the parts.
        values: shape (draws, parts), float64.
        draws: what the draws are called.

    Returns:
        The mean and its standard error, and the standard errors over draws alone and over parts alone (None where
        there is one part).
    """
    sizes, number = _sizes(problem), len(values)
    by_draw, _, parts = weighted(problem, values, sizes)
    mean = float(by_draw.mean())
    of_draws = float(by_draw.var()) / number if number > 1 else math.nan
    by_part = values.mean(0)
    _, of_parts, _ = weighted(problem, by_part[None], sizes)
    if parts < 2 or number < 2:
        known = [v for v in (of_draws, float(of_parts)) if not math.isnan(v)]
        over = f"{number} {draws}" if number > 1 else f"{parts} parts" if parts > 1 else ""
        estimate = Estimate(mean, math.sqrt(known[0]) if known else None, over)
    else:
        residuals = values - by_draw[:, None] - by_part + mean
        _, squares, _ = weighted(problem, residuals, sizes)
        both = float(squares.sum()) / (number * (number - 1))
        variance = max(of_draws + float(of_parts) - both, of_draws, float(of_parts))
        estimate = Estimate(mean, math.sqrt(variance), f"{number} {draws}, {parts} parts")
    return estimate, math.sqrt(of_draws), math.sqrt(float(of_parts)) if parts > 1 else None


def _sizes(problem: Problem) -> Tensor:
    return torch.tensor([part.samples for part in problem.parts], dtype=torch.float64)
