"""The leading eigenvalues, the smallest one and the density from the same Lanczos runs.

A run that serves as a probe of the density has extreme Ritz values as well. So the first probe goes on, if need be,
until the eigenvalues are good enough; its quadrature is taken where the others' is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from flatwise.measure.density import probe_on, probe_vector, probed
from flatwise.measure.eigenvalues import Eigenvalues, eigenvalues_of
from flatwise.measure.hessian import basis_rows, check, converge
from flatwise.measure.journal import Journal
from flatwise.measure.lanczos import Lanczos
from flatwise.measure.problem import Mode, Problem
from flatwise.measure.products import Matrix, Product, Products
from flatwise.measure.progress import Bar
from flatwise.measure.quadrature import Density, density_of
from flatwise.measure.result import Conditions, Cost, plain
from flatwise.measure.select import Parameters


@dataclass(frozen=True)
class Spectrum:
    """What one set of Lanczos runs says about a matrix.

    Attributes:
        eigenvalues: the k of largest absolute value.
        smallest: the smallest eigenvalue.
        density: of the eigenvalues.
        conditions: under which all was measured.
        cost: of all together; the parts carry it as well.
    """

    eigenvalues: Eigenvalues
    smallest: Eigenvalues
    density: Density
    conditions: Conditions
    cost: Cost

    def as_dict(self) -> dict[str, Any]:
        """Return everything but eigenvectors as what JSON can hold.

        Returns:
            A nest of dicts and lists.
        """
        result: dict[str, Any] = plain(replace(self, eigenvalues=replace(self.eigenvalues, vectors=None)))
        return result

    def __str__(self) -> str:
        return "\n".join(str(part) for part in (self.eigenvalues, self.smallest, self.density))


def spectrum(
    model: Module,
    loss_fn: Callable[[Module, Any], Tensor],
    data: Any,
    k: int = 5,
    *,
    iterations: int = 80,
    probes: int = 1,
    points: int = 1001,
    width: float | None = None,
    tol: float = 1e-3,
    max_products: int = 300,
    keep_vectors: bool = False,
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
) -> Spectrum:
    """Find the leading eigenvalues, the smallest, and the density, for hardly more than the density alone.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        data: one batch, or an iterable of batches; the same in every product.
        k: how many eigenvalues.
        iterations: Lanczos steps for each probe.
        probes: random vectors.
        points: of the density's grid.
        width: of its kernel; None: the range over the number of steps.
        tol: largest residual of an eigenvalue, relative to the largest absolute one.
        max_products: of the first run, where to stop in any case.
        keep_vectors: whether the eigenvalues carry eigenvectors.
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
        All three.
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
    check(problem, k, "magnitude", tol, max_products)
    steps = min(iterations, problem.weights)
    rows = max(steps, basis_rows(problem, k, max_products, max_memory))
    operator = Products(problem, matrix=matrix, product=product, max_memory=max_memory, vectors=rows + steps + 2)
    with problem.open(), Bar("spectrum", probes * steps, shown=progress) as bar:
        operator.prepare()
        asked = {"k": k, "rows": rows, "tol": tol, "max_products": max_products, "keep_vectors": keep_vectors}
        journal = operator.journal(resume, "spectrum", steps=steps, **asked)
        first = Lanczos(operator, probe_vector(operator, seed, 0), rows, seed)
        if (held := journal.get("run")) is not None:
            first.load(held)
            bar.advance(min(first.steps, steps))
        # The first probe goes on for the eigenvalues; what is asked of it on the way is put down there.
        if (quadrature := journal.get("quadrature")) is None:
            quadrature = probed(first, operator, steps, probes, lambda: journal.put("run", first.state), bar, progress)
            journal.put("quadrature", quadrature)
        leading = _search(first, operator, k, "magnitude", tol, max_products, keep_vectors, journal, bar)
        smallest = _search(first, operator, 1, "smallest", tol, max_products, False, journal, bar)
        rest = probe_on(range(1, probes), operator, steps, probes, seed, journal, bar, progress)
        products = first.steps + sum(len(nodes) for nodes, _ in rest)
        density = density_of([quadrature, *rest], operator, products, points, width)
    parts = (leading, smallest, density)
    cost = Cost(sum(p.cost.gradient_evaluations for p in parts), sum(p.cost.seconds for p in parts))
    return Spectrum(
        eigenvalues=replace(leading, cost=cost),
        smallest=replace(smallest, cost=cost),
        density=replace(density, cost=cost),
        conditions=density.conditions,
        cost=cost,
    )


def _search(
    run: Lanczos,
    operator: Products,
    k: int,
    which: str,
    tol: float,
    max_products: int,
    keep_vectors: bool,
    journal: Journal,
    bar: Bar,
) -> Eigenvalues:
    """Take up a finished search for eigenvalues, or make it; what is found is put down under what was wanted."""
    held = journal.get(which)
    if held is None:
        ritz = converge(run, operator, k, which, tol, max_products, journal, bar, False)
        found = eigenvalues_of(ritz, run, operator, k, which, tol, keep_vectors)
        kept = ("values", "residuals", "converged", "vectors", "products")
        journal.put(which, {name: getattr(found, name) for name in kept}, now=True)
        return found
    return Eigenvalues(
        **held,
        matrix=operator.matrix,
        which=which,
        tol=tol,
        exact=operator.exact,
        conditions=operator.problem.conditions(),
        cost=operator.problem.cost(),
    )
