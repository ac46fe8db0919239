"""The spectral density, by stochastic Lanczos quadrature.

Each probe runs Lanczos (fully re-orthogonalised) from a random unit vector v. The eigenvalues ``theta_i`` of the
projected matrix and the squares ``tau_i`` of the first entries of its eigenvectors are a Gauss quadrature of v's
spectral measure: ``sum_i tau_i theta_i^p = v^T A^p v`` for all ``p <= 2 m - 1`` after m steps (Golub and Welsch, 1969;
Ghorbani, Krishnan and Xiao, 2019). The mean over v is the density of eigenvalues. It is drawn with a Gaussian kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.errors import UserError
from flatwise.files import read_json, write_json
from flatwise.measure.fingerprint import fingerprint
from flatwise.measure.lanczos import Lanczos, start_vector
from flatwise.measure.problem import Mode, Problem
from flatwise.measure.products import Matrix, Product, Products
from flatwise.measure.progress import Bar
from flatwise.measure.result import Conditions, Cost, digits, plain
from flatwise.measure.select import Parameters
from flatwise.measure.trace import spread, student

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
        products: matrix-vector products.
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
        resume: a file that is written after every probe, and that a later call with the same arguments continues from.
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
        file = None if resume is None else Finished(Path(resume), operator, steps)
        quadratures = [] if file is None else file.quadratures[:probes]
        bar.advance(len(quadratures) * steps)
        like = torch.empty(0, dtype=problem.dtype, device=problem.device)
        for number in range(len(quadratures), probes):
            run = Lanczos(operator, start_vector(problem.weights, seed, ("density", number), like), steps, seed)
            quadratures.append(probed(run, operator, steps, probes, bar, progress))
            if file is not None:
                file.add(quadratures[-1])
        return density_of(quadratures, operator, points, width)


def probed(
    run: Lanczos, operator: Products, steps: int, probes: int, bar: Bar, shown: bool
) -> tuple[list[float], list[float]]:
    """Run one probe.

    Args:
        run: fresh, from a random unit vector.
        operator: what it multiplies with.
        steps: how many.
        probes: how many there are, for the estimate of the time.
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
    return quadrature(run.projected)


def quadrature(projected: Tensor) -> tuple[list[float], list[float]]:
    """Turn the projected matrix of a Lanczos run into a Gauss quadrature.

    Args:
        projected: shape (m, m), symmetric.

    Returns:
        Nodes, ascending, and weights, which sum to 1.
    """
    values, vectors = torch.linalg.eigh(projected)
    return values.tolist(), vectors[0].square().tolist()


def density_of(
    quadratures: list[tuple[list[float], list[float]]], operator: Products, points: int, width: float | None
) -> Density:
    """Make the result.

    Args:
        quadratures: nodes and weights of each probe.
        operator: what was multiplied with.
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
        products=operator.count,
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


class Finished:
    """The file of the probes that are done.

    Args:
        path: where it is; its folder exists.
        operator: what is multiplied with.
        steps: of each probe.

    Attributes:
        quadratures: those in the file.

    Raises:
        UserError: if the file is of another run, or none.
    """

    def __init__(self, path: Path, operator: Products, steps: int) -> None:
        self._path, self._operator = path, operator
        weights = [p.detach() for p in operator.problem.model.parameters()]
        self._settings = {**operator.settings(), "steps": steps, "weights at": fingerprint(weights)}
        self.quadratures: list[tuple[list[float], list[float]]] = []
        if path.exists():
            content = read_json(path)
            settings = content.get("settings") if isinstance(content, dict) else None
            if not isinstance(settings, dict):
                raise UserError(f"{path} is no file of a density run: name another one")
            different = [name for name, value in self._settings.items() if settings.get(name) != value]
            if different:
                raise UserError(
                    f"{path} is from a run with other {', '.join(different)}: name another file, or remove it"
                )
            self.quadratures = [(nodes, weights) for nodes, weights in content["quadratures"]]

    def add(self, quadrature: tuple[list[float], list[float]]) -> None:
        """Write one more.

        Args:
            quadrature: nodes and weights.
        """
        self.quadratures.append(quadrature)
        group = self._operator.problem.group
        if group is None or torch.distributed.get_rank(group) == 0:
            write_json(self._path, {"settings": self._settings, "quadratures": self.quadratures})
