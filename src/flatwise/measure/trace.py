"""The trace, by Hutch++ (Meyer, Musco, Musco and Woodruff, 2021), with its standard error.

The sum of what is known inside a sketched space and a mean over what is outside (see ``sketch.py``). The terms of that
mean are independent, so their spread over the square root of their number is the standard error of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.errors import UnknownNameError, UserError
from flatwise.measure.problem import Mode, Problem
from flatwise.measure.products import Matrix, Product, Products
from flatwise.measure.progress import Bar
from flatwise.measure.result import Conditions, Cost, digits, plain
from flatwise.measure.select import Parameters
from flatwise.measure.sketch import Course, diagonal, look_outside, sketch

METHODS = ("hutch++", "hutchinson")


@dataclass(frozen=True)
class Trace:
    """A trace.

    Attributes:
        value: the estimate.
        standard_error: of the estimate; 0 where it is exact.
        degrees: of freedom of the standard error: one less than the number of terms; 0 where the value is exact.
        sketched: the part of the value that was computed exactly, inside the sketched space.
        probes: matrix-vector products, all runs of a resumed one together.
        method: ``"hutch++"``, ``"hutchinson"``, or ``"exact"`` where there are no more weights than probes.
        matrix: ``"hessian"`` or ``"ggn"``.
        exact: False where products were finite differences.
        conditions: under which it was measured.
        cost: what it cost.
    """

    value: float
    standard_error: float
    degrees: int
    sketched: float
    probes: int
    method: str
    matrix: str
    exact: bool
    conditions: Conditions
    cost: Cost

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return a confidence interval, from Student's t.

        Args:
            level: such as 0.95.

        Returns:
            Its ends.
        """
        half = 0.0 if self.degrees == 0 else student(level, self.degrees) * self.standard_error
        return self.value - half, self.value + half

    def as_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold.

        Returns:
            A nest of dicts and lists.
        """
        result: dict[str, Any] = plain(self)
        return result

    def __str__(self) -> str:
        name = "Hessian" if self.matrix == "hessian" else "Gauss-Newton matrix"
        text = (
            f"trace of the {name}: {digits(self.value, self.standard_error)} ({self.method}, {self.probes} products, "
            f"{self.conditions.samples} samples, mode {self.conditions.mode})"
        )
        return "\n".join([text, *(f"  note: {note}" for note in self.conditions.notes)])


def hessian_trace(
    model: Module,
    loss_fn: Callable[[Module, Any], Tensor],
    data: Any,
    *,
    probes: int = 30,
    method: Literal["hutch++", "hutchinson"] = "hutch++",
    matrix: Matrix = "hessian",
    product: Product = "auto",
    resume: str | Path | None = None,
    max_memory: float | None = None,
    parameters: Parameters = None,
    mode: Mode = "eval",
    micro_batch_size: int | None = None,
    seed: int = 0,
    process_group: Any = None,
    progress: bool = True,
) -> Trace:
    """Estimate the trace.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        data: one batch, or an iterable of batches; the same in every product.
        probes: how many products; where there are no more weights than that, the trace is exact.
        method: ``"hutch++"``, or ``"hutchinson"``: random signs only.
        matrix: ``"hessian"`` or ``"ggn"``, the Gauss-Newton matrix.
        product: ``"exact"`` (double backward), ``"finite difference"``, or ``"auto"``: exact where that exists.
        resume: a file that is written as it goes, and that a later call with the same arguments continues from.
        max_memory: bytes that graphs and vectors may take; None: half of what is free.
        parameters: which parameters the matrix is about; None: all that are trainable.
        mode: ``"eval"``, ``"train"`` or ``"as is"``.
        micro_batch_size: samples evaluated at once; None: a batch.
        seed: of the probes, and of what the loss draws.
        process_group: whose processes each bring their share of the data; None: this process alone.
        progress: whether a bar and an estimate of the time are shown, on standard error.

    Returns:
        The estimate and its standard error.

    Raises:
        UnknownNameError: an unknown method.
        UserError: too few probes.
    """
    problem = Problem(
        model,
        loss_fn,
        data,
        parameters=parameters,
        mode=mode,
        micro_batch_size=micro_batch_size,
        seed=seed,
        process_group=process_group,
    )
    if method not in METHODS:
        raise UnknownNameError("method", str(method), METHODS)
    least = 6 if method == "hutch++" else 2
    if not isinstance(probes, int) or probes < least:
        raise UserError(f"probes must be a whole number >= {least} for a standard error, got {probes!r}")
    n = problem.weights
    sketched = probes // 3 if method == "hutch++" and probes < n else 0
    operator = Products(problem, matrix=matrix, product=product, max_memory=max_memory, vectors=sketched)
    with problem.open(), Bar("trace", min(n, probes), shown=progress) as bar:
        operator.prepare()

        def multiply(vector: Tensor) -> Tensor:
            result = operator(vector)
            bar.advance()
            if operator.count == 1:
                operator.announce("trace", min(n, probes), min(n, probes), progress)
            return result

        course = Course(torch.zeros(sketched, n, dtype=problem.dtype, device=problem.device))
        journal = operator.journal(resume, "trace", method=method, probes=probes)
        if (held := journal.get("course")) is not None:
            course.load(held)
            bar.advance(course.products)

        def save() -> None:
            journal.put("course", course.state)

        if n <= probes:
            diagonal(multiply, course, n, save)
        else:
            sketch(multiply, course, seed, save)
            look_outside(multiply, course, probes - 2 * sketched, seed, save)
        journal.put("course", course.state, now=True)
        inside = float(sum(course.inside))
        mean, error = spread(course.terms)
        return Trace(
            value=inside + mean,
            standard_error=error,
            degrees=max(0, len(course.terms) - 1),
            sketched=inside,
            probes=course.products,
            method="exact" if n <= probes else str(method),
            matrix=matrix,
            exact=operator.exact,
            conditions=problem.conditions(),
            cost=problem.cost(),
        )


def spread(terms: list[float]) -> tuple[float, float]:
    """Average independent terms.

    Args:
        terms: of one distribution.

    Returns:
        Their mean and its standard error; zeros where there is none.
    """
    if len(terms) < 2:
        return (terms[0] if terms else 0.0), 0.0
    mean = math.fsum(terms) / len(terms)
    variance = math.fsum((t - mean) ** 2 for t in terms) / (len(terms) - 1)
    return mean, math.sqrt(variance / len(terms))


def student(level: float, degrees: int) -> float:
    """Return the quantile of Student's t for a two-sided interval.

    Args:
        level: such as 0.95.
        degrees: of freedom.

    Returns:
        How many standard errors half of the interval is.

    Raises:
        UserError: without scipy.
    """
    try:
        from scipy.stats import t
    except ImportError as error:
        raise UserError("confidence intervals need scipy: pip install 'flatwise[measure]'") from error
    return float(t.ppf((1 + level) / 2, degrees))
