"""The spectral density as a result: from the quadratures of the probes to a curve with a band.

The kernel that draws the curve, the moments and the mass between two numbers all come from the same nodes and weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatwise.measure.products import Products
from flatwise.measure.result import Conditions, Cost, digits, plain
from flatwise.measure.trace import spread, student

Quadrature = tuple[list[float], list[float]]
"""Nodes, ascending, and weights."""

MOMENTS = 4
"""How many moments a result carries."""


@dataclass(frozen=True)
class Density:
    """How the eigenvalues are distributed.

    Attributes:
        grid: eigenvalues, evenly spaced.
        density: mean over the probes of the smoothed density; its integral is 1.
        low: lower end of the pointwise 95 % band of that mean, from the spread of the probes; the density itself where
            there is one probe.
        high: its upper end.
        width: standard deviation of the Gaussian kernel.
        nodes: the quadrature's nodes, for each probe.
        weights: their weights, for each probe, which sum to 1.
        smallest: the smallest node: not below the smallest eigenvalue, and near it where that stands apart.
        largest: the largest node.
        moments: mean of the p-th power of the eigenvalues, p = 1 to 4, exact but for the choice of probes; the first is
            the trace over the number of weights.
        moment_errors: their standard errors; NaN with one probe.
        products: matrix-vector products, all runs of a resumed one together.
        matrix: ``"hessian"`` or ``"ggn"``.
        exact: False where products were finite differences.
        conditions: under which it was measured.
        cost: what it cost.
    """

    grid: tuple[float, ...]
    density: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    width: float
    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    smallest: float
    largest: float
    moments: tuple[float, ...]
    moment_errors: tuple[float, ...]
    products: int
    matrix: str
    exact: bool
    conditions: Conditions
    cost: Cost

    def as_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold.

        Returns:
            A nest of dicts and lists.
        """
        result: dict[str, Any] = plain(self)
        return result

    def mass(self, low: float, high: float) -> tuple[float, float]:
        """Return the share of the eigenvalues between two numbers, from the nodes, without the kernel.

        Args:
            low: from here.
            high: to here, not included.

        Returns:
            The share and its standard error (NaN with one probe).
        """
        shares = [
            math.fsum(w for t, w in zip(nodes, weights, strict=True) if low <= t < high)
            for nodes, weights in zip(self.nodes, self.weights, strict=True)
        ]
        return _estimate(shares)

    def __str__(self) -> str:
        name = "Hessian" if self.matrix == "hessian" else "Gauss-Newton matrix"
        lines = [
            f"spectral density of the {name} ({len(self.nodes)} probes of up to {max(map(len, self.nodes))} steps, "
            f"{self.conditions.samples} samples, mode {self.conditions.mode})",
            f"  from {self.smallest:.3g} to {self.largest:.3g}; kernel width {self.width:.2g}",
            f"  mean eigenvalue {digits(self.moments[0], self.moment_errors[0])}",
            f"  {self.products} products, {self.cost.gradient_evaluations:.3g} gradient evaluations",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.conditions.notes)])


def quadrature(projected: Tensor) -> Quadrature:
    """Turn the projected matrix of a Lanczos run into a Gauss quadrature.

    Args:
        projected: shape (m, m), symmetric.

    Returns:
        Nodes, ascending, and weights, which sum to 1.
    """
    values, vectors = torch.linalg.eigh(projected)
    return values.tolist(), vectors[0].square().tolist()


def density_of(
    quadratures: list[Quadrature], operator: Products, products: int, points: int, width: float | None
) -> Density:
    """Make the result.

    Args:
        quadratures: nodes and weights of each probe.
        operator: what was multiplied with.
        products: how often, all runs of a resumed one together.
        points: of the grid.
        width: of the kernel, or None.

    Returns:
        The result.
    """
    smallest = min(nodes[0] for nodes, _ in quadratures)
    largest = max(nodes[-1] for nodes, _ in quadratures)
    if width is None:
        spread_ = (largest - smallest) or abs(largest) or 1.0
        width = spread_ / max(len(nodes) for nodes, _ in quadratures)
    # Four widths beyond the last node hold all but 3e-5 of its mass.
    grid = torch.linspace(smallest - 4 * width, largest + 4 * width, points, dtype=torch.float64)
    curves = torch.stack([smoothed(grid, nodes, weights, width) for nodes, weights in quadratures])
    mean = curves.mean(dim=0)
    low = high = mean
    if len(quadratures) > 1:
        half = student(0.95, len(quadratures) - 1) * curves.std(dim=0) / math.sqrt(len(quadratures))
        low, high = (mean - half).clamp(min=0), mean + half
    moments = [
        _estimate([math.fsum(w * t**p for t, w in zip(*pair, strict=True)) for pair in quadratures])
        for p in range(1, MOMENTS + 1)
    ]
    return Density(
        grid=tuple(grid.tolist()),
        density=tuple(mean.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        width=width,
        nodes=tuple(tuple(nodes) for nodes, _ in quadratures),
        weights=tuple(tuple(weights) for _, weights in quadratures),
        smallest=smallest,
        largest=largest,
        moments=tuple(value for value, _ in moments),
        moment_errors=tuple(error for _, error in moments),
        products=products,
        matrix=operator.matrix,
        exact=operator.exact,
        conditions=operator.problem.conditions(),
        cost=operator.problem.cost(),
    )


def smoothed(grid: Tensor, nodes: list[float], weights: list[float], width: float) -> Tensor:
    """Put a Gaussian of each weight at each node.

    Args:
        grid: shape (points,).
        nodes: where.
        weights: how much.
        width: standard deviation.

    Returns:
        Shape (points,).
    """
    at, mass = torch.tensor(nodes, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    bells = torch.exp(-((grid[:, None] - at) ** 2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi))
    return bells @ mass


def _estimate(terms: list[float]) -> tuple[float, float]:
    mean, error = spread(terms)
    return mean, error if len(terms) > 1 else math.nan
