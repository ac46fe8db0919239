"""The steps of Hutch++ (Meyer, Musco, Musco and Woodruff, 2021), each of which can be interrupted after any product.

With a third of the products the range of the matrix is sketched, ``Q = orth(A S)``; with a third the trace inside is
computed exactly, ``tr(Q^T A Q)``; with the rest what is outside is estimated from random signs g (Hutchinson, 1990):
``mean g^T P A P g``, ``P = I - Q Q^T``. Given Q, that mean is unbiased and its terms are independent, so their spread
tells how far the sum may be off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from flatwise.measure.lanczos import orthogonalised
from flatwise.seeds import stream


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


@dataclass
class Course:
    """What is done of an estimate.

    Attributes:
        basis: of the range, shape (rank, weights); as many rows as ``found`` are filled.
        found: rows so far.
        drawn: random vectors that were multiplied to find them.
        inside: of each row q, ``q^T A q``; where the trace is exact, of each weight the entry on the diagonal.
        terms: what each random vector says about the rest.
    """

    basis: Tensor
    found: int = 0
    drawn: int = 0
    inside: list[float] = field(default_factory=list)
    terms: list[float] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return what continues this estimate.

        Returns:
            What torch.save can write.
        """
        basis = self.basis[: self.found].clone().cpu()
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "basis": basis}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: of an estimate of the same kind.
        """
        self.basis[: state["found"]] = state["basis"].to(self.basis)
        self.found, self.drawn = state["found"], state["drawn"]
        self.inside, self.terms = list(state["inside"]), list(state["terms"])

    @property
    def products(self) -> int:
        """Matrix-vector products so far."""
        return self.drawn + len(self.inside) + len(self.terms)


Save = Callable[[], object]
"""Puts down what is done."""


def diagonal(multiply: Callable[[Tensor], Tensor], course: Course, n: int, save: Save) -> None:
    """Read the diagonal of a matrix.

    Args:
        multiply: the matrix.
        course: what is done.
        n: number of weights.
        save: called after each product.
    """
    like = course.basis
    for place in range(len(course.inside), n):
        unit = torch.zeros(n, dtype=like.dtype, device=like.device)
        unit[place] = 1
        course.inside.append(float(multiply(unit)[place]))
        save()


def sketch(multiply: Callable[[Tensor], Tensor], course: Course, seed: int, save: Save) -> None:
    """Find an orthonormal basis of what the matrix makes of random vectors, and the trace inside.

    Args:
        multiply: the matrix.
        course: what is done; how many rows its basis has is how many random vectors there are.
        seed: of the random vectors.
        save: called after each product.
    """
    basis = course.basis
    rank, n = basis.shape
    for number in range(course.drawn, rank):
        image = multiply(signs(n, seed, "sketch", number, basis))
        length = image.norm()
        rest, _ = orthogonalised(basis[: course.found], image)
        # What is left of a matrix of low rank is rounding, and no direction.
        if bool(rest.norm() > 100 * torch.finfo(basis.dtype).eps * length):
            rest, _ = orthogonalised(basis[: course.found], rest / rest.norm())
            basis[course.found] = rest / rest.norm()
            course.found += 1
        course.drawn += 1
        save()
    for q in basis[len(course.inside) : course.found]:
        course.inside.append(float(torch.dot(q.double(), multiply(q).double())))
        save()


def look_outside(multiply: Callable[[Tensor], Tensor], course: Course, number: int, seed: int, save: Save) -> None:
    """Evaluate the quadratic form of random signs outside the basis.

    Args:
        multiply: the matrix.
        course: what is done.
        number: of random vectors.
        seed: of them.
        save: called after each product.
    """
    basis = course.basis[: course.found]
    for i in range(len(course.terms), number):
        g, _ = orthogonalised(basis, signs(basis.shape[1], seed, "probe", i, basis))
        course.terms.append(float(torch.dot(g.double(), multiply(g).double())))
        save()
