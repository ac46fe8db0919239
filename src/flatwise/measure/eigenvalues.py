"""The result of a search for eigenvalues: each with its residual, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flatwise.measure.lanczos import Lanczos, Ritz, order
from flatwise.measure.products import Products
from flatwise.measure.result import Conditions, Cost, digits, plain


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues, the most wanted first.

    Attributes:
        values: the eigenvalues.
        residuals: ``|A v - lambda v|`` for each, with a unit vector v; some eigenvalue of A is that near or nearer.
        converged: whether the residual is at most ``tol`` times the largest absolute eigenvalue.
        vectors: unit eigenvectors in rows, shape (k, weights), in the order of the parameters; None where they were not
            asked for.
        matrix: ``"hessian"`` or ``"ggn"``.
        which: what was wanted.
        tol: the relative residual that was asked for.
        products: matrix-vector products, all runs of a resumed one together.
        exact: False where products were finite differences.
        conditions: under which it was measured.
        cost: what it cost.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: tuple[bool, ...]
    vectors: Tensor | None
    matrix: str
    which: str
    tol: float
    products: int
    exact: bool
    conditions: Conditions
    cost: Cost

    @property
    def ratio(self) -> float:
        """The first over the fifth (lambda_max / lambda_5 of Jastrzebski et al., 2020); NaN with fewer than five."""
        if len(self.values) < 5:
            return math.nan
        return self.values[0] / self.values[4] if self.values[4] else math.copysign(math.inf, self.values[0])

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the vectors as what JSON can hold.

        Returns:
            A nest of dicts and lists.
        """
        result: dict[str, Any] = plain(self)
        result["vectors"] = None
        return {**result, "ratio": self.ratio}

    def __str__(self) -> str:
        name = "Hessian" if self.matrix == "hessian" else "Gauss-Newton matrix"
        wanted = {"magnitude": "largest absolute", "largest": "largest", "smallest": "smallest"}[self.which]
        lines = [f"{wanted} eigenvalues of the {name} ({self.conditions.samples} samples, mode {self.conditions.mode})"]
        lines += [
            f"  {digits(v, r)}" + ("" if c else "   (not converged)")
            for v, r, c in zip(self.values, self.residuals, self.converged, strict=True)
        ]
        lines.append(f"  {self.products} products, {self.cost.gradient_evaluations:.3g} gradient evaluations")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.conditions.notes)])


def eigenvalues_of(
    ritz: Ritz, run: Lanczos, operator: Products, k: int, which: str, tol: float, keep_vectors: bool
) -> Eigenvalues:
    """Make the result.

    Args:
        ritz: the last pairs.
        run: the process.
        operator: what it multiplied with.
        k: how many.
        which: which.
        tol: relative residual.
        keep_vectors: whether it carries vectors.

    Returns:
        The result.
    """
    places = order(ritz.values, which)[:k]
    residuals = ritz.residuals[places].tolist()
    limit = tol * float(ritz.values.abs().max())
    vectors = None
    if keep_vectors:
        vectors = run.vectors(ritz.vectors[:, places])
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return Eigenvalues(
        values=tuple(ritz.values[places].tolist()),
        residuals=tuple(residuals),
        converged=tuple(r <= limit for r in residuals),
        vectors=vectors,
        matrix=operator.matrix,
        which=which,
        tol=tol,
        products=run.steps,
        exact=operator.exact,
        conditions=operator.problem.conditions(),
        cost=operator.problem.cost(),
    )
