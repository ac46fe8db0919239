"""The trace, by Hutch++ (Meyer, Musco, Musco and Woodruff, 2021), with its standard error.

With a third of the products the range of the matrix is sketched, ``Q = orth(A S)``; with a third the trace inside is
computed exactly, ``tr(Q^T A Q)``; with the rest what is outside is estimated from random signs g (Hutchinson, 1990):
``mean g^T P A P g``, ``P = I - Q Q^T``. Given Q, that mean is unbiased and its terms are independent, so their spread
over the square root of their number is the standard error of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.errors import UnknownNameError, UserError
from flatwise.measure.lanczos import orthogonalised
from flatwise.measure.problem import Mode, Problem
from flatwise.measure.products import Matrix, Product, Products
from flatwise.measure.progress import Bar
from flatwise.measure.result import Conditions, Cost, digits, plain
from flatwise.measure.select import Parameters
from flatwise.seeds import stream

METHODS = ("hutch++", "hutchinson")


@dataclass(frozen=True)
class Trace:
    """A trace.

    Attributes:
        value: the estimate.
        standard_error: of the estimate; 0 where it is exact.
        degrees: of freedom of the standard error: one less than the number of terms; 0 where the value is exact.
        sketched: the part of the value that was computed exactly, inside the sketched space.
        probes: matrix-vector products.
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
    sketch = probes // 3 if method == "hutch++" else 0
    operator = Products(problem, matrix=matrix, product=product, max_memory=max_memory, vectors=sketch)
    with problem.open(), Bar("trace", min(n, probes), shown=progress) as bar:
        operator.prepare()

        def multiply(vector: Tensor) -> Tensor:
            result = operator(vector)
            bar.advance()
            if operator.count == 1:
                operator.announce("trace", min(n, probes), min(n, probes), progress)
            return result

        like = torch.empty(0, dtype=problem.dtype, device=problem.device)
        if n <= probes:
            method_used, sketched, terms = "exact", _diagonal(multiply, n, like), []
        else:
            method_used = str(method)
            basis, sketched = _sketch(multiply, n, sketch, seed, like)
            terms = _terms(multiply, basis, probes - 2 * sketch, n, seed)
        mean, error = spread(terms)
        return Trace(
            value=sketched + mean,
            standard_error=error,
            degrees=max(0, len(terms) - 1),
            sketched=sketched,
            probes=operator.count,
            method=method_used,
            matrix=matrix,
            exact=operator.exact,
            conditions=problem.conditions(),
            cost=problem.cost(),
        )


def _diagonal(multiply: Callable[[Tensor], Tensor], n: int, like: Tensor) -> float:
    total = 0.0
    for place in range(n):
        unit = torch.zeros(n, dtype=like.dtype, device=like.device)
        unit[place] = 1
        total += float(multiply(unit)[place])
    return total


def signs(n: int, seed: int, kind: str, number: int, like: Tensor) -> Tensor:
    """Draw random signs, the same on every process and device.

    Args:
        n: how many.
        seed: of the measure.
        kind: what for.
        number: which probe.
        like: whose dtype and device.

    Returns:
        Shape (n,).
    """
    return (2.0 * torch.randint(2, (n,), generator=stream(seed, kind, number)) - 1).to(like)


def _sketch(multiply: Callable[[Tensor], Tensor], n: int, rank: int, seed: int, like: Tensor) -> tuple[Tensor, float]:
    """Find an orthonormal basis of what the matrix makes of random vectors, and the trace inside."""
    basis = torch.zeros(rank, n, dtype=like.dtype, device=like.device)
    found = 0
    for number in range(rank):
        image = multiply(signs(n, seed, "sketch", number, like))
        length = image.norm()
        rest, _ = orthogonalised(basis[:found], image)
        # What is left of a matrix of low rank is rounding, and no direction.
        if bool(rest.norm() > 100 * torch.finfo(like.dtype).eps * length):
            rest, _ = orthogonalised(basis[:found], rest / rest.norm())
            basis[found] = rest / rest.norm()
            found += 1
    basis = basis[:found]
    inside = sum(float(torch.dot(q.double(), multiply(q).double())) for q in basis)
    return basis, float(inside)


def _terms(multiply: Callable[[Tensor], Tensor], basis: Tensor, number: int, n: int, seed: int) -> list[float]:
    """Evaluate the quadratic form of random signs outside a basis."""
    terms = []
    for i in range(number):
        g, _ = orthogonalised(basis, signs(n, seed, "probe", i, basis))
        terms.append(float(torch.dot(g.double(), multiply(g).double())))
    return terms


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
