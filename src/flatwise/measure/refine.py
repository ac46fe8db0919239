"""From coarse to fine: measuring a plane only where it bends, and saying how wrong the rest may be.

A coarse grid is cut into cells. New points in a cell are first predicted from what is known, then measured. Where the
prediction was wrong by more than the tolerance, the cell's quarters are cut again; where it was right, the points left
out are predicted, from nearer neighbours than those that were measured. At the end some of those are measured after
all, spread over the plane; a cell whose check fails is cut, and others are checked. The error of the last checks, which
nothing was fitted to, is what the result reports.

Predictions are local: through the nearest known points goes the surface ``sum_k c_k |x - x_k|^3 + p(x)`` with a
quadratic p, as radial basis functions of that order need no parameter (Duchon, 1977). A point that is not finite is not
predicted from, and all cells that touch one are measured in full.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from flatwise.seeds import stream

NEIGHBOURS = 16
"""Known points that a prediction is made from."""

COARSE = 6
"""Cells along an axis at the start, about."""

LENIENT = 3.0
"""How many times larger a share of the range an error may be on the logarithmic scale."""

SPLIT = 1.5
"""A cell is cut where the error was so many times the tolerance: what is left out lies nearer to what is known, and
even at an edge half as far means half the error."""

CHECKED = 0.04
"""Share of the points that a round of checks measures."""

Index = tuple[int, ...]
Found = tuple[Tensor, Tensor, float | None]
Plan = Generator[list[Index], Sequence[float], Found]


def predicted(known: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Predict values of a function of two coordinates from those at scattered places.

    Args:
        known: shape (places, 2), float64, all different.
        values: shape (places,), float64, finite.
        wanted: shape (wanted, 2).

    Returns:
        Shape (wanted,).
    """
    count = min(NEIGHBOURS, len(known))
    chosen, result = _nearest(known, wanted, count), []
    for rows, targets in zip(torch.split(chosen, 256), torch.split(wanted, 256), strict=True):
        places, heights = known[rows], values[rows]
        # In units of the neighbourhood, so that the system is as well conditioned on any scale.
        radius = (places - targets[:, None]).norm(dim=2).amax(dim=1).clamp_min(1e-300)[:, None, None]
        places = (places - targets[:, None]) / radius
        terms = _terms(places)
        size = count + terms.shape[2]
        system = torch.zeros(len(targets), size, size, dtype=torch.float64)
        system[:, :count, :count] = torch.cdist(places, places).pow(3)
        system[:, :count, count:], system[:, count:, :count] = terms, terms.mT
        # Few places may lie on a line, or a conic: then the polynomial is not unique, and the shortest one is taken.
        right = torch.cat([heights, heights.new_zeros(len(targets), terms.shape[2])], dim=1)
        weights = torch.linalg.lstsq(system, right[..., None], driver="gelsd").solution[..., 0]
        here = torch.cat([places.norm(dim=2).pow(3), _terms(torch.zeros(len(targets), 1, 2).double())[:, 0]], dim=1)
        result.append((here * weights).sum(dim=1))
    return torch.cat(result)


def _terms(places: Tensor) -> Tensor:
    x, y = places.unbind(dim=-1)
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1)


def _nearest(known: Tensor, wanted: Tensor, count: int) -> Tensor:
    distances = torch.cdist(wanted, known, compute_mode="donot_use_mm_for_euclid_dist")
    # Rounded and stable: neighbours at the same distance are taken in their order, wherever this runs.
    order = (distances * 1e9).round().argsort(dim=1, stable=True)
    return order[:, :count]


class Scale:
    """The scale on which values are predicted, and errors are compared with the range.

    Values that differ by more than a factor of 30 are seen on a logarithmic scale, where the valley is not flattened by
    the walls: ``log(v + range / 1000)``, if none is negative. An error counts as the larger of its share of the range
    on the plain scale, and a third of its share on that one.

    Args:
        values: those that are known; what is not finite is left out.
    """

    def __init__(self, values: Tensor) -> None:
        values = values[torch.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
        self.range = high - low
        self.lowest = low
        self._floor = self.range / 1000 if low >= 0 and high > 30 * low else None
        ends = self.there(torch.tensor([low, high], dtype=torch.float64))
        self._span = float(ends[1] - ends[0])

    @property
    def wide(self) -> bool:
        """Whether the scale is logarithmic."""
        return self._floor is not None

    def there(self, values: Tensor) -> Tensor:
        """Go to the scale."""
        return values if self._floor is None else (values.clamp_min(0.0) + self._floor).log()

    def back(self, values: Tensor) -> Tensor:
        """Come back from it."""
        return values if self._floor is None else values.exp() - self._floor

    def error(self, guess: float, value: float) -> float:
        """Say how wrong a prediction was, as a share of the range.

        Args:
            guess: the prediction.
            value: what was measured.

        Returns:
            A share; infinity where one of them is not finite and the other is.
        """
        if not (math.isfinite(guess) and math.isfinite(value)):
            return 0.0 if math.isfinite(guess) == math.isfinite(value) else math.inf
        if self.range <= 1e-9 * abs(self.lowest):  # nothing but rounding
            return 0.0 if abs(guess - value) <= 1e-6 * abs(value) else math.inf
        pair = self.there(torch.tensor([guess, value], dtype=torch.float64))
        return max(abs(guess - value) / self.range, abs(float(pair[1] - pair[0])) / self._span / LENIENT)


@dataclass
class _Cell:
    low: Index
    high: Index
    error: float = math.inf

    def points(self) -> list[Index]:
        """All points of the grid in the cell, its edges included."""
        return list(product(*(range(a, b + 1) for a, b in zip(self.low, self.high, strict=True))))

    def corners(self) -> list[Index]:
        return list(product(*zip(self.low, self.high, strict=True)))

    @property
    def full(self) -> bool:
        """Whether there is no point but the corners."""
        return all(b - a <= 1 for a, b in zip(self.low, self.high, strict=True))

    def pieces(self) -> list[_Cell]:
        """Cut each side that can be cut in the middle."""
        sides = []
        for a, b in zip(self.low, self.high, strict=True):
            middle = (a + b) // 2
            sides.append([(a, b)] if b - a <= 1 else [(a, middle), (middle, b)])
        return [_Cell((x[0], y[0]), (x[1], y[1])) for x, y in product(*sides)]


def refined(sizes: Index, tolerance: float, seed: int) -> Plan:
    """Measure a plane from coarse to fine.

    What is asked for depends on the answers alone, so that whoever has some of them already goes the same way.

    Args:
        sizes: points on each axis.
        tolerance: the largest error of a prediction, as a share of the range.
        seed: of the choice of points to check.

    Returns:
        A generator: it yields indices of points and is sent their values. What it returns at its end: the values, shape
        ``sizes``; whether each was measured; the largest error of the last checks, as a share of the range, None where
        no point is left to be predicted.
    """
    return _rounds(sizes, tolerance, seed)


def _rounds(sizes: Index, tolerance: float, seed: int) -> Plan:
    values = torch.full(sizes, math.nan, dtype=torch.float64)
    measured = torch.zeros(sizes, dtype=torch.bool)
    logarithmic = True  # predictions are made on the scale on which the last ones came out better

    def visit(points: Iterable[Index]) -> Generator[list[Index], Sequence[float], dict[Index, float]]:
        """Predict, then measure, and return the errors of the predictions."""
        nonlocal logarithmic
        new = sorted({point for point in points if not measured[point]})
        guesses = [_guesses(values, measured, new, way) for way in (True, False)]
        for point, value in zip(new, (yield new), strict=True):
            values[point], measured[point] = value, True
        scale = Scale(values[measured])
        errors = [{point: scale.error(guess[point], float(values[point])) for point in new} for guess in guesses]
        worst = [max(error.values(), default=0.0) for error in errors]
        logarithmic = worst[0] <= worst[1]
        return errors[0] if logarithmic else errors[1]

    # Twice as coarse first, so that the first cells know how well they are predicted.
    edges = [_edges(size, max(2, round((size - 1) / COARSE))) for size in sizes]
    yield from visit(product(*(side[::2] if len(side) % 2 else [*side[:-1:2], side[-1]] for side in edges)))
    errors = yield from visit(product(*edges))
    cells = [_Cell((a, c), (b, d)) for (a, b), (c, d) in product(*(list(pairwise(side)) for side in edges))]
    _judge(cells, errors)
    draws = stream(seed, "points to check")
    while True:
        while bad := [cell for cell in cells if not cell.full and _bends(cell, values, tolerance)]:
            kept = [cell for cell in cells if cell not in bad]
            pieces = [piece for cell in bad for piece in cell.pieces()]
            errors = yield from visit(corner for piece in pieces for corner in piece.corners())
            _judge(pieces, errors)
            cells = kept + pieces
        left = [point for point in product(*map(range, sizes)) if not measured[point]]
        if not left:
            return values, measured, None
        order = torch.randperm(len(left), generator=draws)[: max(4, round(CHECKED * measured.numel()))]
        errors = yield from visit(left[number] for number in order.tolist())
        worst = max(errors.values())
        if worst <= tolerance:
            break
        for cell in cells:
            if any(errors.get(point, 0.0) > tolerance for point in cell.points()):
                cell.error = math.inf
    rest = [point for point in product(*map(range, sizes)) if not measured[point]]
    for point, guess in _guesses(values, measured, rest, logarithmic).items():
        values[point] = guess
    return values, measured, worst


def _edges(size: int, step: int) -> list[int]:
    """Cut an axis into cells of ``step`` points; what is left over makes a smaller last one."""
    return sorted({*range(0, size, step), size - 1})


def _judge(cells: Sequence[_Cell], errors: dict[Index, float]) -> None:
    for cell in cells:
        cell.error = max((errors.get(corner, 0.0) for corner in cell.corners()), default=0.0)


def _bends(cell: _Cell, values: Tensor, tolerance: float) -> bool:
    return cell.error > SPLIT * tolerance or not all(math.isfinite(values[corner]) for corner in cell.corners())


def _guesses(values: Tensor, measured: Tensor, wanted: Sequence[Index], logarithmic: bool) -> dict[Index, float]:
    known = (measured & torch.isfinite(values)).nonzero()
    if len(known) < 3 or not wanted:
        return dict.fromkeys(wanted, math.nan)
    heights = values[known[:, 0], known[:, 1]]
    scale = Scale(heights)
    there, places = scale.wide and logarithmic, torch.tensor(wanted, dtype=torch.float64)
    guesses = predicted(known.double(), scale.there(heights) if there else heights, places)
    guesses = scale.back(guesses) if there else guesses
    # A valley that is seen on a logarithmic scale must not be dug deeper than what was measured.
    guesses = guesses.clamp_min(scale.lowest) if scale.wide else guesses
    return dict(zip(wanted, guesses.tolist(), strict=True))


def guessed(values: Tensor, measured: Tensor) -> Tensor:
    """Fill in what was not measured yet, for a picture of a plane that is not complete.

    Args:
        values: shape (points, points).
        measured: where they were.

    Returns:
        The values, with predictions between those that were measured.
    """
    values = values.clone()
    places = measured.nonzero()
    if len(places) < 8:
        return values
    low, high = places.amin(dim=0).tolist(), places.amax(dim=0).tolist()
    rest = [(i, j) for i in range(low[0], high[0] + 1) for j in range(low[1], high[1] + 1) if not measured[i, j]]
    for point, guess in _guesses(values, measured, rest, logarithmic=True).items():
        values[point] = guess
    return values
