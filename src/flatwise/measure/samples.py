"""How many samples a measure needs: its value on random subsets of growing size.

A curvature of few samples is not that of many with noise on it: the largest eigenvalue of a mean of few matrices is too
large. So both are shown for each size, the mean over disjoint random subsets and how far single subsets are apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.batching import count, pick
from flatwise.errors import UserError
from flatwise.measure.data import read_batches
from flatwise.measure.result import Conditions, Cost, digits, plain
from flatwise.seeds import stream


@dataclass(frozen=True)
class SamplesCurve:
    """A measure against the number of samples.

    Attributes:
        sizes: numbers of samples.
        values: mean over the subsets of each size.
        errors: standard error of that mean; NaN where there is one subset.
        spreads: standard deviation of one subset's value; NaN where there is one subset.
        measured: the value on each subset.
        conditions: of the last measurement, on the largest size.
        cost: of all together, in gradient evaluations over all the samples.
    """

    sizes: tuple[int, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]
    spreads: tuple[float, ...]
    measured: tuple[tuple[float, ...], ...]
    conditions: Conditions
    cost: Cost

    def enough(self, relative: float = 0.1) -> int | None:
        """Return the smallest size from which on the value is near to that of all samples, also on one subset.

        Args:
            relative: how near: the distance of the mean and the spread, each over the value at the largest size.

        Returns:
            A number of samples; None where only the largest size is near, which says nothing about more samples.
        """
        last = self.values[-1]
        limit = relative * abs(last)
        found = None
        for size, value, spread in reversed(list(zip(self.sizes[:-1], self.values, self.spreads, strict=False))):
            if not (abs(value - last) <= limit and (math.isnan(spread) or spread <= limit)):
                break
            found = size
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold.

        Returns:
            A nest of dicts and lists.
        """
        result: dict[str, Any] = plain(self)
        return result

    def __str__(self) -> str:
        lines = ["samples  value            spread of one subset"]
        for size, value, error, spread in zip(self.sizes, self.values, self.errors, self.spreads, strict=True):
            shown = "-" if math.isnan(spread) else f"{spread:.2g}"
            lines.append(f"{size:7d}  {digits(value, error):15s}  {shown}")
        return "\n".join(lines)


def samples_curve(
    measure: Callable[..., Any],
    model: Module,
    loss_fn: Callable[[Module, Any], Tensor],
    data: Any,
    sizes: Sequence[int] | None = None,
    *,
    subsets: int = 5,
    value: Callable[[Any], float] | None = None,
    seed: int = 0,
    **options: Any,
) -> SamplesCurve:
    """Measure on random subsets of growing size.

    Args:
        measure: such as :func:`hessian_eigenvalues` or :func:`hessian_trace`.
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        data: one batch, or an iterable of batches, whose samples can be counted.
        sizes: numbers of samples, of this process; None: all, a half, a quarter and so on, six sizes.
        subsets: how many subsets of a size at most; as many as fit without a sample in common.
        value: takes the number from a result; None: ``result.value``, or the first of ``result.values``.
        seed: of the subsets, and of the measure.
        **options: of the measure.

    Returns:
        The curve.

    Raises:
        UserError: if samples cannot be counted, or a size is out of range.
    """
    batches = read_batches(data)
    try:
        counts = [count(batch) for batch in batches]
    except ValueError as error:
        raise UserError(f"a curve against the number of samples needs batches that can be cut: {error}") from error
    total = sum(counts)
    if sizes is None:
        sizes = sorted({max(1, total // 2**power) for power in range(6)})
    if not sizes or any(not 1 <= size <= total for size in sizes) or subsets < 1:
        raise UserError(f"sizes must be from 1 to {total}, which is all samples, and subsets >= 1; got {list(sizes)!r}")
    number = value or _number
    measured: list[tuple[float, ...]] = []
    evaluations = seconds = 0.0
    sizes = sorted(sizes)
    for size in sizes:
        order = torch.randperm(total, generator=stream(seed, "subsets", size))
        row: list[float] = []
        for place in range(min(subsets, total // size)):
            chosen = order[place * size : (place + 1) * size].sort().values
            result = measure(model, loss_fn, iter(_subset(batches, counts, chosen)), seed=seed, **options)
            row.append(number(result))
            evaluations += result.cost.gradient_evaluations * size / total
            seconds += result.cost.seconds
        measured.append(tuple(row))
    spreads = [statistics.stdev(row) if len(row) > 1 else math.nan for row in measured]
    return SamplesCurve(
        sizes=tuple(sizes),
        values=tuple(statistics.fmean(row) for row in measured),
        errors=tuple(s / math.sqrt(len(row)) for s, row in zip(spreads, measured, strict=True)),
        spreads=tuple(spreads),
        measured=tuple(measured),
        conditions=result.conditions,
        cost=Cost(evaluations, seconds),
    )


def _number(result: Any) -> float:
    return float(result.values[0] if hasattr(result, "values") else result.value)


def _subset(batches: Sequence[Any], counts: Sequence[int], chosen: Tensor) -> list[Any]:
    """Take the chosen samples, numbered through all batches."""
    taken = []
    start = 0
    for batch, size in zip(batches, counts, strict=True):
        here = chosen[(chosen >= start) & (chosen < start + size)] - start
        if here.numel():
            taken.append(pick(batch, here))
        start += size
    return taken
