"""The rows of curvature in the table of sharpness, and how far an eigenvalue may be off because of the samples.

To first order an eigenvalue moves with the matrix as ``v^T dH v``, v its eigenvector held fixed. So ``v^T H_b v``, with
H_b the Hessian of part b, is what part b says about it: the mean over the parts is the eigenvalue itself, and the
spread gives its standard error over samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatwise.measure.eigenvalues import Eigenvalues
from flatwise.measure.linearised import HessianPart
from flatwise.measure.problem import Problem
from flatwise.measure.spread import Estimate, over_parts


@dataclass
class WarmStart:
    """Where the search for eigenvalues ended, for the next one to start from.

    Attributes:
        found: eigenvalues with vectors; None before the first search.
    """

    found: Eigenvalues | None = None


def quadratic_forms(problem: Problem, vectors: Sequence[Tensor]) -> Tensor:
    """Evaluate ``v^T H_b v`` on every part.

    Args:
        problem: the loss; open.
        vectors: each of shape (weights,).

    Returns:
        Shape (vectors, parts), float64, on the CPU.
    """
    forms = torch.empty(len(vectors), len(problem.parts), dtype=torch.float64)
    for column, part in enumerate(problem.parts):
        graphs = HessianPart(problem, part)
        for row, vector in enumerate(vectors):
            product = problem.flat(graphs.product(problem.shaped(vector)))
            problem.spend(part, graphs.cost)
            forms[row, column] = float(torch.dot(product.double(), vector.double()))
    return forms


def top(problem: Problem, found: Eigenvalues) -> tuple[Estimate, Estimate | None]:
    """Give the first eigenvalue, and its ratio to the last that was found, their standard errors over samples.

    Args:
        problem: on whose parts; open.
        found: eigenvalues with vectors.

    Returns:
        The largest eigenvalue; and the ratio, None where there is a single one. Without errors where the model has no
        double backward.
    """
    first, last = found.values[0], found.values[-1]
    ratio = first / last if len(found.values) > 1 and last else None
    if not found.exact or found.vectors is None:
        return Estimate(first, None, ""), None if ratio is None else Estimate(ratio, None, "")
    forms = quadratic_forms(problem, list(found.vectors[[0, -1] if ratio is not None else [0]]))
    largest = over_parts(problem, forms[0])
    estimate = Estimate(first, largest.standard_error, largest.over)
    if ratio is None:
        return estimate, None
    # The delta method: a / b moves with its parts as (a_b - r b_b) / b.
    moved = over_parts(problem, (forms[0] - ratio * forms[1]) / last)
    return estimate, Estimate(ratio, moved.standard_error, moved.over)
