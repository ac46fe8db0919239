"""The leading eigenvalues of the Hessian or the Gauss-Newton matrix, each with its residual.

One Lanczos run (see ``lanczos.py``) that looks after every product whether the wanted Ritz pairs are good enough.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.errors import UserError, nearest
from flatwise.measure.eigenvalues import Eigenvalues, eigenvalues_of
from flatwise.measure.fingerprint import fingerprint
from flatwise.measure.journal import Journal
from flatwise.measure.lanczos import Lanczos, Ritz, order, start_vector
from flatwise.measure.memory import free_memory
from flatwise.measure.problem import Mode, Problem
from flatwise.measure.products import Matrix, Product, Products
from flatwise.measure.progress import Bar
from flatwise.measure.select import Parameters

Which = Literal["magnitude", "largest", "smallest"]

USUAL = 20
"""Products that a top five usually takes."""

NEWS = 0.05
"""Share of a random vector in a warm start: what is new since then must be met."""


def hessian_eigenvalues(
    model: Module,
    loss_fn: Callable[[Module, Any], Tensor],
    data: Any,
    k: int = 5,
    *,
    matrix: Matrix = "hessian",
    which: Which = "magnitude",
    tol: float = 1e-3,
    max_products: int = 300,
    product: Product = "auto",
    warm_start: Tensor | Eigenvalues | None = None,
    keep_vectors: bool = False,
    resume: str | Path | None = None,
    max_memory: float | None = None,
    parameters: Parameters = None,
    mode: Mode = "eval",
    micro_batch_size: int | None = None,
    seed: int = 0,
    process_group: Any = None,
    progress: bool = True,
) -> Eigenvalues:
    """Find the k leading eigenvalues.

    An eigenvalue that occurs several times is found once, unless the basis comes to span everything that it can reach.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        data: one batch, or an iterable of batches; the same in every product.
        k: how many.
        matrix: ``"hessian"`` or ``"ggn"``, the Gauss-Newton matrix.
        which: ``"magnitude"``, ``"largest"`` or ``"smallest"``.
        tol: largest residual, relative to the largest absolute eigenvalue.
        max_products: where to stop in any case.
        product: ``"exact"`` (double backward), ``"finite difference"``, or ``"auto"``: exact where that exists.
        warm_start: an earlier result with vectors, or a vector, to start from.
        keep_vectors: whether the result carries eigenvectors.
        resume: a file that is written as it goes, and that a later call with the same arguments continues from.
        max_memory: bytes that graphs and vectors may take; None: half of what is free.
        parameters: which parameters the matrix is about; None: all that are trainable.
        mode: ``"eval"``, ``"train"`` or ``"as is"``.
        micro_batch_size: samples evaluated at once; None: a batch.
        seed: of the start vector, and of what the loss draws.
        process_group: whose processes each bring their share of the data; None: this process alone.
        progress: whether a bar and an estimate of the time are shown, on standard error.

    Returns:
        The eigenvalues.
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
    check(problem, k, which, tol, max_products)
    rows = basis_rows(problem, k, max_products, max_memory)
    operator = Products(problem, matrix=matrix, product=product, max_memory=max_memory, vectors=rows + 1)
    with problem.open():
        start = _start(problem, warm_start, seed)
        operator.prepare()
        run = Lanczos(operator, start, rows, seed)
        journal = operator.journal(resume, "eigenvalues", rows=run.rows, start=fingerprint([start]))
        if (held := journal.get("run")) is not None:
            run.load(held)
        with Bar("eigenvalues", max(USUAL, 4 * k), shown=progress) as bar:
            ritz = converge(run, operator, k, which, tol, max_products, journal, bar, progress)
        return eigenvalues_of(ritz, run, operator, k, which, tol, keep_vectors)


def check(problem: Problem, k: int, which: str, tol: float, max_products: int) -> None:
    """Check what a caller asks for.

    Args:
        problem: whose eigenvalues.
        k: how many.
        which: which.
        tol: relative residual.
        max_products: where to stop.

    Raises:
        UserError: where one is out of its range.
    """
    if which not in ("magnitude", "largest", "smallest"):
        raise UserError(
            f"which must be 'magnitude', 'largest' or 'smallest', got {which!r}"
            f"{nearest(str(which), ('magnitude', 'largest', 'smallest'))}"
        )
    if not isinstance(k, int) or not 1 <= k <= problem.weights:
        raise UserError(f"k must be a whole number from 1 to the number of weights, {problem.weights}, got {k!r}")
    if not tol > 0:
        raise UserError(f"tol must be > 0, got {tol!r}")
    if max_products < k:
        raise UserError(f"max_products must be at least k={k}, got {max_products!r}")


def basis_rows(problem: Problem, k: int, most: int, max_memory: float | None) -> int:
    """Choose how many vectors the basis may have.

    Args:
        problem: whose.
        k: eigenpairs that are wanted.
        most: products that may be made.
        max_memory: bytes for everything; None: half of what is free.

    Returns:
        As many as a third of the memory holds, and never fewer than 2 k + 10.
    """
    memory = free_memory(problem.device) / 2 if max_memory is None else max_memory
    held = memory / 3 / (problem.weights * problem.dtype.itemsize)
    return int(min(problem.weights, most, max(held, 2 * k + 10)))


def _start(problem: Problem, warm: Tensor | Eigenvalues | None, seed: int) -> Tensor:
    like = torch.empty(0, dtype=problem.dtype, device=problem.device)
    drawn = start_vector(problem.weights, seed, ("start",), like)
    if warm is None:
        return drawn
    if isinstance(warm, Eigenvalues):
        if warm.vectors is None:
            raise UserError("warm_start needs a result with vectors: make it with keep_vectors=True")
        warm = warm.vectors.sum(dim=0)
    if warm.numel() != problem.weights:
        raise UserError(f"warm_start has {warm.numel()} numbers, but there are {problem.weights} weights")
    warm = warm.detach().reshape(-1).to(like)
    length = warm.norm()
    return drawn if not bool(length > 0) else warm / length + NEWS * drawn


def converge(
    run: Lanczos,
    operator: Products,
    k: int,
    which: str,
    tol: float,
    max_products: int,
    journal: Journal,
    bar: Bar,
    shown: bool,
) -> Ritz:
    """Go on until the wanted Ritz pairs are good enough.

    Args:
        run: the process, fresh or continued.
        operator: what it multiplies with.
        k: how many are wanted.
        which: which.
        tol: relative residual.
        max_products: where to stop.
        journal: where to put down what is done, as "run".
        bar: to advance.
        shown: whether the estimate of the time is.

    Returns:
        The last Ritz pairs.
    """
    while True:
        if run.size >= k:
            ritz = run.ritz()
            if operator.agreed(good(ritz, k, which, tol)) or run.complete or run.steps >= max_products:
                break
            if run.full:
                # Half of the room is left for new vectors, which is where convergence comes from.
                run.restart(min(max(k + 5, run.rows // 2), run.rows - 2), which)
        run.step()
        bar.advance(total=max(float(USUAL), run.steps + 1.0))
        if operator.count == 1:
            operator.announce("eigenvalues", max(USUAL, 4 * k), max_products, shown)
        journal.put("run", run.state)
    journal.put("run", run.state, now=True)
    return ritz


def good(ritz: Ritz, k: int, which: str, tol: float) -> bool:
    """Say whether the wanted pairs are good enough.

    Args:
        ritz: all pairs.
        k: how many are wanted.
        which: which.
        tol: largest residual, relative to the largest absolute value.

    Returns:
        Whether all k are.
    """
    limit = tol * float(ritz.values.abs().max())
    return bool((ritz.residuals[order(ritz.values, which)[:k]] <= limit).all())
