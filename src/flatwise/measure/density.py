"""The spectral density, by stochastic Lanczos quadrature.

Each probe runs Lanczos (fully re-orthogonalised) from a random unit vector v. The eigenvalues ``theta_i`` of the
projected matrix and the squares ``tau_i`` of the first entries of its eigenvectors are a Gauss quadrature of v's
spectral measure: ``sum_i tau_i theta_i^p = v^T A^p v`` for all ``p <= 2 m - 1`` after m steps (Golub and Welsch, 1969;
Ghorbani, Krishnan and Xiao, 2019). The mean over v is the density of eigenvalues. It is drawn with a Gaussian kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.errors import UserError
from flatwise.measure.journal import Journal
from flatwise.measure.lanczos import Lanczos, start_vector
from flatwise.measure.problem import Mode, Problem
from flatwise.measure.products import Matrix, Product, Products
from flatwise.measure.progress import Bar
from flatwise.measure.quadrature import Density, Quadrature, density_of, quadrature
from flatwise.measure.select import Parameters


def hessian_density(
    model: Module,
    loss_fn: Callable[[Module, Any], Tensor],
    data: Any,
    *,
    iterations: int = 80,
    probes: int = 10,
    points: int = 1001,
    width: float | None = None,
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
) -> Density:
    """Estimate the spectral density.

    Args:
        model: any module.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        data: one batch, or an iterable of batches; the same in every product.
        iterations: Lanczos steps for each probe (Ghorbani et al., 2019, use about as many).
        probes: random vectors (as many as theirs).
        points: of the grid.
        width: standard deviation of the kernel; None: the range of the nodes over the number of steps, which is about
            as fine as so many steps see: a narrower one shows single nodes, a wider one hides what was seen.
        matrix: ``"hessian"`` or ``"ggn"``, the Gauss-Newton matrix.
        product: ``"exact"`` (double backward), ``"finite difference"``, or ``"auto"``: exact where that exists.
        resume: a file that is written as it goes, and that a later call with the same arguments continues from; it may
            ask for more probes.
        max_memory: bytes that graphs and vectors may take; None: half of what is free.
        parameters: which parameters the matrix is about; None: all that are trainable.
        mode: ``"eval"``, ``"train"`` or ``"as is"``.
        micro_batch_size: samples evaluated at once; None: a batch.
        seed: of the probes, and of what the loss draws.
        process_group: whose processes each bring their share of the data; None: this process alone.
        progress: whether a bar and an estimate of the time are shown, on standard error.

    Returns:
        The density, with its nodes and weights.

    Raises:
        UserError: numbers out of range.
    """
    for name, value, least in (("iterations", iterations, 1), ("probes", probes, 1), ("points", points, 2)):
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} must be a whole number >= {least}, got {value!r}")
    if width is not None and not width > 0:
        raise UserError(f"width must be > 0, got {width!r}")
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
    steps = min(iterations, problem.weights)
    operator = Products(problem, matrix=matrix, product=product, max_memory=max_memory, vectors=steps + 1)
    with problem.open(), Bar("density", probes * steps, shown=progress) as bar:
        operator.prepare()
        journal = operator.journal(resume, "density", steps=steps)
        quadratures = probe_on(range(probes), operator, steps, probes, seed, journal, bar, progress)
        return density_of(quadratures, operator, sum(len(nodes) for nodes, _ in quadratures), points, width)


def probe_on(
    numbers: Sequence[int],
    operator: Products,
    steps: int,
    probes: int,
    seed: int,
    journal: Journal,
    bar: Bar,
    shown: bool,
) -> list[Quadrature]:
    """Run the probes that are missing.

    Args:
        numbers: of the probes that are wanted, in order.
        operator: what to multiply with.
        steps: of each.
        probes: how many there are, for the estimate of the time.
        seed: of their vectors.
        journal: where to put down what is done, as "quadratures" and "probe".
        bar: to advance.
        shown: whether the estimate is.

    Returns:
        One quadrature for each.
    """
    quadratures: list[Quadrature] = list(journal.get("quadratures") or [])[: len(numbers)]
    bar.advance(len(quadratures) * steps)
    for number in numbers[len(quadratures) :]:
        run = Lanczos(operator, probe_vector(operator, seed, number), steps, seed)
        held = journal.get("probe")
        if held is not None and held["number"] == number:
            run.load(held["run"])
            bar.advance(run.steps)

        def save(run: Lanczos = run, number: int = number) -> None:
            journal.put("probe", lambda: {"number": number, "run": run.state()})

        quadratures.append(probed(run, operator, steps, probes, save, bar, shown))
        journal.put("probe", None)
        journal.put("quadratures", list(quadratures), now=True)
    return quadratures


def probe_vector(operator: Products, seed: int, number: int) -> Tensor:
    """Draw the vector of a probe.

    Args:
        operator: what it is multiplied with.
        seed: of the measure.
        number: of the probe.

    Returns:
        Shape (weights,).
    """
    problem = operator.problem
    like = torch.empty(0, dtype=problem.dtype, device=problem.device)
    return start_vector(problem.weights, seed, ("density", number), like)


def probed(
    run: Lanczos, operator: Products, steps: int, probes: int, save: Callable[[], None], bar: Bar, shown: bool
) -> Quadrature:
    """Run one probe.

    Args:
        run: from a random unit vector, fresh or continued.
        operator: what it multiplies with.
        steps: how many.
        probes: how many there are, for the estimate of the time.
        save: puts down what is done.
        bar: to advance.
        shown: whether the estimate is.

    Returns:
        Nodes and weights.
    """
    while run.steps < steps and not run.ended:
        run.step()
        bar.advance()
        if operator.count == 1:
            operator.announce("density", probes * steps, probes * steps, shown)
        save()
    return quadrature(run.projected)
