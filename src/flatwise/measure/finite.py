"""Products without a double backward: central differences along the vector.

``H v ~ |v| (g(w + h v/|v|) - g(w - h v/|v|)) / 2h``, two gradients; for Gauss-Newton ``J v`` is the same difference of
the model's outputs. Rounding asks for a long step h, curvature that changes for a short one. So the first vector is
multiplied with h = h0, h0/4, h0/16, h0/64, where ``h0 = cbrt(eps) max(1, |w|)``, and of the neighbours that agree best
the shorter step is kept; how far they differ is the error that is reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from flatwise.measure.linearised import GaussNewtonPart, outputs_of
from flatwise.measure.problem import BACKWARD, FORWARD, Problem
from flatwise.measure.unchanged import Displaced

STEPS = 4
"""How many step lengths are tried."""


class FiniteDifferences:
    """Multiplies vectors by the curvature of this process's share of the samples.

    Args:
        problem: open.
        matrix: ``"hessian"`` or ``"ggn"``.
    """

    def __init__(self, problem: Problem, matrix: str) -> None:
        self._problem = problem
        self._form: Callable[[Tensor, float], Tensor] = self._hessian if matrix == "hessian" else self._gauss_newton
        self.step: float | None = None
        self.cost = 2 * (FORWARD + BACKWARD) if matrix == "hessian" else 3 * FORWARD + BACKWARD
        self.used: set[int] = set()

    def product(self, vector: Tensor) -> Tensor:
        """Multiply a vector by this process's share of the matrix; sum it over the processes afterwards.

        Args:
            vector: shape (weights,).

        Returns:
            Shape (weights,).
        """
        norm = float(vector.norm())
        if norm == 0:
            return torch.zeros_like(vector)
        unit = vector / norm
        if self.step is None:
            self.step = self._choose(unit)
        return self._form(unit, self.step) * norm

    def _choose(self, unit: Tensor) -> float:
        problem = self._problem
        eps: float = max(torch.finfo(p.dtype).eps for p in problem.params)
        size = float(torch.stack([p.detach().double().square().sum() for p in problem.params]).sum().sqrt())
        longest = eps ** (1 / 3) * max(1.0, size)
        steps: list[float] = [longest / 4**i for i in range(STEPS)]
        # Summed over the processes, so that all of them choose the same step.
        products = [problem.summed(self._form(unit, step)) for step in steps]
        gaps = [float((a - b).norm()) for a, b in itertools.pairwise(products)]
        best = min(range(len(gaps)), key=gaps.__getitem__)
        size = float(products[best + 1].norm())
        problem.note(
            f"products are central differences with step {steps[best + 1]:.1e}; one with a step four times as long "
            f"differs by {gaps[best] / size if size else 0.0:.0e} of its length"
        )
        return steps[best + 1]

    def _hessian(self, unit: Tensor, step: float) -> Tensor:
        problem = self._problem
        total = torch.zeros_like(unit)
        direction = problem.shaped(unit)
        with Displaced(problem.params) as weights:
            for sign in (1.0, -1.0):
                weights.move(direction, sign * step)
                for part in problem.parts:
                    with torch.enable_grad():
                        loss = problem.loss_of(part)
                    grads = problem.gradients_of(loss)
                    problem.spend(part, BACKWARD)
                    self.used |= {number for number, g in enumerate(grads) if g is not None}
                    total.add_(problem.flat(grads), alpha=sign * problem.share(part) / (2 * step))
        return total

    def _gauss_newton(self, unit: Tensor, step: float) -> Tensor:
        problem = self._problem
        total = torch.zeros_like(unit)
        direction = problem.shaped(unit)
        for part in problem.parts:
            ends: list[list[Tensor]] = []
            with Displaced(problem.params) as weights:
                for sign in (1.0, -1.0):
                    weights.move(direction, sign * step)
                    with torch.enable_grad(), outputs_of(problem) as outputs:
                        problem.loss_of(part)
                    ends.append(outputs)
            pushed = [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)]
            graphs = GaussNewtonPart(problem, part, jacobian=False)
            self.used |= graphs.used
            total.add_(problem.flat(graphs.back(pushed)), alpha=problem.share(part))
        return total
