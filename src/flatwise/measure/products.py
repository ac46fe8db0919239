"""Products of the Hessian or the Gauss-Newton matrix with vectors, at the cost of two gradients each.

The graph of the gradient is built once for each part and kept where memory allows; a product is then one backward pass
through it. Where it does not fit, it is built anew each time (three gradients), on parts as large as fit. Where an
operation has no double backward, products are finite differences.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flatwise.errors import UserError, nearest
from flatwise.measure import determinism
from flatwise.measure.attention import twice_differentiable
from flatwise.measure.data import Part
from flatwise.measure.finite import FiniteDifferences
from flatwise.measure.fit import Fit
from flatwise.measure.journal import Journal
from flatwise.measure.linearised import GaussNewtonPart, HessianPart, Linearised
from flatwise.measure.problem import Problem
from flatwise.measure.progress import announce

Matrix = Literal["hessian", "ggn"]
Product = Literal["auto", "exact", "finite difference"]

_NO_SECOND_DERIVATIVE = re.compile(
    r"not implemented|twice|double backward|does not support|once_differentiable", re.IGNORECASE
)


class Products:
    """Multiplies vectors by the curvature of a problem, over all its parts and processes.

    Args:
        problem: open while this is used.
        matrix: ``"hessian"``, or ``"ggn"``: the Gauss-Newton matrix ``J^T H_L J`` of the model's outputs.
        product: ``"exact"``: double backward. ``"finite difference"``. ``"auto"``: exact where that exists.
        max_memory: bytes that graphs and vectors may take together; None: half of what is free, and never an error.
        vectors: how many vectors the caller keeps.

    Attributes:
        count: products so far.

    Raises:
        UserError: an unknown matrix or product, or a budget that is no number of bytes.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        matrix: Matrix = "hessian",
        product: Product = "auto",
        max_memory: float | None = None,
        vectors: int = 0,
    ) -> None:
        for name, value, known in (
            ("matrix", matrix, ("hessian", "ggn")),
            ("product", product, ("auto", "exact", "finite difference")),
        ):
            if value not in known:
                raise UserError(
                    f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}{nearest(str(value), known)}"
                )
        if max_memory is not None and not max_memory > 0:
            raise UserError(f"max_memory must be a number of bytes > 0, got {max_memory!r}")
        self.problem, self.matrix, self._product, self._max_memory = problem, matrix, product, max_memory
        self.count = 0
        self._vectors = vectors
        self._finite = FiniteDifferences(problem, matrix) if product == "finite difference" else None
        self._keep: set[int] = set()
        self._kept: dict[int, Linearised] = {}
        self._used: set[int] = set()
        self._seconds = 0.0

    @property
    def exact(self) -> bool:
        """Whether products come from a double backward."""
        return self._finite is None

    def prepare(self) -> None:
        """Cut the samples into parts, and see that the loss is the same every time."""
        problem = self.problem
        second, cut = None, False
        if self._finite is None:
            try:
                fit = Fit(problem, self._use, self._vectors, self._max_memory)
                second, cut = self._cut(fit)
                self._keep = fit.keep
            except RuntimeError as error:
                if not self._falls_back(error):
                    raise
        if not cut:
            first = problem.parts[0]
            determinism.insist(problem, self._started(first), self._evaluated(first) if second is None else second)

    def _cut(self, fit: Fit) -> tuple[tuple[Tensor, Tensor] | None, bool]:
        whole = self.problem.parts[0]

        def evaluated(part: Part) -> tuple[Tensor, Tensor]:
            if part is whole or part.number not in fit.keep:
                return self._evaluated(part)
            self._keep = fit.keep
            return self._started(part)

        second, cut = fit.in_pieces(evaluated)
        if not cut:
            self._kept.clear()
        return second, cut

    def _started(self, part: Part) -> tuple[Tensor, Tensor]:
        """Evaluate from the graphs of the products, where they hold the gradient."""
        if self._finite is not None or self.matrix == "ggn":
            return self._evaluated(part)
        graphs = self._graphs(part)
        return graphs.loss, self.problem.flat(graphs.gradient)

    def _evaluated(self, part: Part) -> tuple[Tensor, Tensor]:
        """Evaluate with the kernels that the products use."""
        if self._finite is not None:
            return determinism.evaluated(self.problem, part)
        with twice_differentiable(self.problem.note):
            return determinism.evaluated(self.problem, part)

    def _use(self, part: Part) -> Callable[[], object]:
        graphs = self._build(part)
        ones = [torch.ones_like(p) for p in self.problem.params]

        def product() -> None:
            self.problem.flat(graphs.product(ones))
            self.problem.spend(part, graphs.cost)

        return product

    def _build(self, part: Part) -> Linearised:
        return HessianPart(self.problem, part) if self.matrix == "hessian" else GaussNewtonPart(self.problem, part)

    def _falls_back(self, error: RuntimeError) -> bool:
        """Go on with finite differences, if the error says that there is no double backward.

        Args:
            error: what was raised.

        Returns:
            Whether it does.

        Raises:
            UserError: if exact products were asked for.
        """
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, torch.OutOfMemoryError) or not _NO_SECOND_DERIVATIVE.search(str(error)):
            return False
        if self._product == "exact":
            raise UserError(
                f"an operation of the model has no double backward ({reason:.120}): use product='finite difference'"
            ) from error
        self.problem.note(f"an operation has no double backward ({reason:.120})")
        self._finite = FiniteDifferences(self.problem, self.matrix)
        return True

    def _graphs(self, part: Part) -> Linearised:
        if part.number in self._kept:
            return self._kept[part.number]
        graphs = self._build(part)
        self._used |= graphs.used
        if part.number in self._keep:
            self._kept[part.number] = graphs
        return graphs

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply.

        Args:
            vector: shape (weights,), the same on every process.

        Returns:
            Shape (weights,), the same bits on every process.

        Raises:
            UserError: if the product is not finite.
        """
        problem = self.problem
        begin = time.perf_counter()
        if self._finite is not None:
            total = self._finite.product(vector)
            self._used |= self._finite.used
        else:
            total = self._exactly(vector)
        total = problem.summed(total)
        if self.count == 0:
            problem.say_used(self._used)
        self.count += 1
        if not bool(torch.isfinite(total.sum())):
            raise UserError("a product with the Hessian is not finite: is the loss finite, and its gradient, here?")
        self._seconds = time.perf_counter() - begin
        return total

    def _exactly(self, vector: Tensor) -> Tensor:
        problem = self.problem
        shaped = problem.shaped(vector)
        total: Tensor | None = None
        for part in problem.parts:
            graphs = self._graphs(part)
            piece = problem.flat(graphs.product(shaped)).mul_(problem.share(part))
            problem.spend(part, graphs.cost)
            total = piece if total is None else total.add_(piece)
            del graphs
        return torch.zeros_like(vector) if total is None else total

    def announce(self, what: str, usual: int, most: int, shown: bool) -> None:
        """Say how long it will take, where that is more than a few seconds.

        Args:
            what: is measured.
            usual: a usual number of products.
            most: the largest number.
            shown: False says nothing.
        """
        if shown and self.problem.leads:
            announce(what, "a product", self._seconds, usual, most)

    def agreed(self, answer: bool) -> bool:
        """Let every process come to the same decision.

        Args:
            answer: of this process.

        Returns:
            Whether all say yes.
        """
        return self.problem.smallest(int(answer)) == 1

    def journal(self, path: str | Path | None, what: str, **settings: Any) -> Journal:
        """Open the file of a run with these products, which are prepared.

        Args:
            path: where it is; None: none.
            what: is measured.
            **settings: what its bits depend on besides.

        Returns:
            What is done.
        """
        journal = Journal(path, what, self.problem, {"matrix": self.matrix, "product": self._product, **settings})
        if self._finite is not None:
            self._finite.step = journal.get("step")  # it was chosen with the first vector
            journal.put("step", lambda: self._finite and self._finite.step)
        return journal
