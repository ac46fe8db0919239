"""The leading eigenvalues of the Hessian or the Gauss-Newton matrix, each with its residual.

One Lanczos run (see ``lanczos.py``) that looks after every product whether the wanted Ritz pairs are good enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.errors import UserError, nearest
from flatwise.files import write_atomically
from flatwise.measure.fingerprint import fingerprint
from flatwise.measure.lanczos import Lanczos, Ritz, order, start_vector
from flatwise.measure.memory import free_memory
from flatwise.measure.problem import Mode, Problem
from flatwise.measure.products import Matrix, Product, Products
from flatwise.measure.progress import Bar
from flatwise.measure.result import Conditions, Cost, digits, plain
from flatwise.measure.select import Parameters

Which = Literal["magnitude", "largest", "smallest"]

USUAL = 20
"""Products that a top five usually takes."""

SECONDS_BETWEEN_WRITES = 10.0
"""How often a run that can be resumed writes what it has."""

SHARE_OF_WRITING = 0.05
"""Of the time, at most; a slow disk makes writing rarer."""

NEWS = 0.05
"""Share of a random vector in a warm start: what is new since then must be met."""


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
        file = None if resume is None else Resume(Path(resume), operator, run, start)
        with Bar("eigenvalues", max(USUAL, 4 * k), shown=progress) as bar:
            ritz = converge(run, operator, k, which, tol, max_products, file, bar, progress)
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
    file: Resume | None,
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
        file: where to write what is done.
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
        if file is not None:
            file.write()
    if file is not None:
        file.write(now=True)
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


class Resume:
    """The file of a run that can be resumed.

    Args:
        path: where it is; its folder exists. Processes that share the work need to see the same file.
        operator: what the run multiplies with.
        run: loaded from the file, where there is one.
        start: the start vector, which belongs to what the file must agree with.

    Raises:
        UserError: if the file is of another run, or none.
    """

    def __init__(self, path: Path, operator: Products, run: Lanczos, start: Tensor) -> None:
        self._path, self._run, self._problem = path, run, operator.problem
        weights = [p.detach() for p in operator.problem.model.parameters()]
        self._settings = {
            **operator.settings(),
            "rows": run.rows,
            "weights at": fingerprint(weights),
            "start": fingerprint([start]),
        }
        if path.exists():
            self._read()
        if not operator.agreed(self._everywhere(run.steps)):
            raise UserError(f"{path} is not the same file on every process")
        self._last, self._took = time.monotonic(), 0.0

    def _everywhere(self, steps: int) -> bool:
        mine = torch.tensor([steps, 1], dtype=torch.float64, device=self._problem.device)
        total, processes = self._problem.summed(mine.clone()).tolist()
        return bool(total == steps * processes)

    def _read(self) -> None:
        try:
            state = torch.load(self._path, weights_only=True, map_location="cpu")
            settings = state["settings"]
        except Exception as error:
            raise UserError(f"{self._path} is no file of an eigenvalue run ({error}): name another one") from error
        different = [name for name, value in self._settings.items() if settings.get(name) != value]
        if different:
            raise UserError(
                f"{self._path} is from a run with other {', '.join(different)}: name another file, or remove it"
            )
        self._run.load(state)

    def write(self, *, now: bool = False) -> None:
        """Write what is done, unless that was just now.

        Args:
            now: in any case.
        """
        # The whole basis is written: where that takes long, it is written rarely.
        if not now and time.monotonic() - self._last < max(SECONDS_BETWEEN_WRITES, self._took / SHARE_OF_WRITING):
            return
        if self._problem.group is None or torch.distributed.get_rank(self._problem.group) == 0:
            begin = time.monotonic()
            state = {**self._run.state(), "settings": self._settings}
            write_atomically(self._path, lambda file: torch.save(state, file))
            self._took = time.monotonic() - begin
        self._last = time.monotonic()
