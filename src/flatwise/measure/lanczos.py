"""The Lanczos process with full re-orthogonalisation and thick restart.

From a start vector it builds an orthonormal basis V, one product at a time, with ``A V_m = V_m B + beta v_{m+1} e_m^T``
(Lanczos, 1950). Each new vector is made orthogonal to all others by classical Gram-Schmidt, twice (two passes are
enough: Giraud, Langou, Rozloznik and van den Eshof, 2005). B is kept as it was measured, so the length of
``A y - theta y`` for a Ritz vector ``y = V s`` is known exactly, without a product: the root of
``|(B - theta) s|^2 + (beta s_m)^2``. That holds for inexact products as well, whose B is not symmetric, and after a
restart: it keeps a space that B maps into itself (Stewart, 2001), so that nothing of the products is lost. For a
symmetric B that is the space of the wanted Ritz vectors (Wu and Simon, 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatwise.seeds import stream


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs.

    Attributes:
        values: shape (m,), float64, ascending.
        vectors: shape (m, m), in columns, in the basis.
        residuals: shape (m,), ``|A y - theta y|``.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class Lanczos:
    """A basis that grows by one vector for each product.

    Args:
        multiply: the symmetric matrix.
        start: shape (n,), not zero.
        rows: how many vectors are kept at most, at least 2; fewer than n make restarts necessary.
        seed: of the vectors that are drawn where the process ends early.

    Attributes:
        size: number of basis vectors that were multiplied.
        steps: number of products.
        ended: whether the basis spans a space that the matrix maps into itself, from the start vector on.
    """

    def __init__(self, multiply: Callable[[Tensor], Tensor], start: Tensor, rows: int, seed: int) -> None:
        n = start.numel()
        self._multiply, self._seed = multiply, seed
        self.rows = min(rows, n)
        self.size = self.steps = 0
        self.ended = False
        # One row more than is multiplied: the next vector.
        self._basis = torch.empty(min(self.rows + 1, n), n, dtype=start.dtype, device=start.device)
        self._basis[0] = start / start.norm()
        self._matrix = torch.zeros(self.rows + 1, self.rows, dtype=torch.float64)

    @property
    def full(self) -> bool:
        """Whether there is no room for another product."""
        return self.size == self.rows

    @property
    def complete(self) -> bool:
        """Whether the basis spans everything."""
        return self.size == self._basis.shape[1]

    @property
    def projected(self) -> Tensor:
        """``V^T A V``, made symmetric, shape (size, size)."""
        square: Tensor = self._matrix[: self.size, : self.size]
        return 0.5 * (square + square.T)

    def step(self) -> None:
        """Multiply the newest vector, and make the next one."""
        m = self.size
        basis = self._basis[: m + 1]
        w = self._multiply(basis[m])
        w, coefficients = orthogonalised(basis, w)
        beta = float(w.norm())
        self._matrix[: m + 1, m] = coefficients.double().cpu()
        self.size, self.steps = m + 1, self.steps + 1
        if self.complete:
            return
        scale = float(self._matrix[: m + 1, : m + 1].abs().max())
        if beta > 10 * torch.finfo(w.dtype).eps * scale:
            self._matrix[m + 1, m] = beta
            self._basis[m + 1] = w / beta
        else:
            # What was found is closed under the matrix. What else there is can only be met from another start.
            self.ended = True
            self._basis[m + 1] = self._another()

    def _another(self) -> Tensor:
        """Draw a unit vector that is orthogonal to the basis."""
        basis = self._basis[: self.size]
        drawn = torch.randn(basis.shape[1], generator=stream(self._seed, "lanczos", self.steps), dtype=torch.float64)
        w, _ = orthogonalised(basis, drawn.to(basis))
        w, _ = orthogonalised(basis, w / w.norm())
        unit: Tensor = w / w.norm()
        return unit

    def ritz(self) -> Ritz:
        """Find the eigenpairs of the projected matrix.

        Returns:
            As many as the basis has vectors.
        """
        values, vectors = torch.linalg.eigh(self.projected)
        left = self._matrix[: self.size + 1, : self.size] @ vectors
        left[: self.size] -= vectors * values
        return Ritz(values, vectors, left.norm(dim=0))

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Put vectors together.

        Args:
            coordinates: shape (size, k), in the basis.

        Returns:
            Shape (k, n).
        """
        return coordinates.T.to(self._basis) @ self._basis[: self.size]

    def restart(self, kept: int, which: str) -> None:
        """Keep only the space of some eigenvectors of B, and go on from there.

        Args:
            kept: how many, fewer than ``size``; one more where a pair of complex ones would be parted.
            which: which are wanted, as for :func:`order`.
        """
        m = self.size
        coordinates = invariant(self._matrix[:m, :m], kept, which)
        p = coordinates.shape[1]
        turn = coordinates.to(self._basis)
        for columns in torch.split(self._basis, 2**20 // m + 1, dim=1):  # views: no second basis is needed
            columns[:p] = turn.T @ columns[:m]
        self._basis[p] = self._basis[m]
        matrix = torch.zeros_like(self._matrix)
        matrix[:p, :p] = coordinates.T @ self._matrix[:m, :m] @ coordinates
        matrix[p, :p] = self._matrix[m, :m] @ coordinates
        self._matrix, self.size = matrix, p

    def state(self) -> dict[str, Any]:
        """Return what continues this process.

        Returns:
            What torch.save can write.
        """
        return {
            # Of a view torch.save would write all that it is a view of.
            "basis": self._basis[: min(self.size + 1, self._basis.shape[0])].clone().cpu(),
            "matrix": self._matrix.clone(),
            "size": self.size,
            "steps": self.steps,
            "ended": self.ended,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: of a process with as many rows.
        """
        self._basis[: state["basis"].shape[0]] = state["basis"].to(self._basis)
        self._matrix = state["matrix"].clone()
        self.size, self.steps, self.ended = state["size"], state["steps"], state["ended"]


def invariant(matrix: Tensor, kept: int, which: str) -> Tensor:
    """Find an orthonormal basis of the space of some eigenvectors, which the matrix maps into itself.

    Args:
        matrix: shape (m, m), float64, nearly symmetric.
        kept: how many, fewer than m; one more where a pair of complex ones would be parted.
        which: which are wanted, as for :func:`order`.

    Returns:
        Shape (m, p), in columns.
    """
    values, vectors = torch.linalg.eig(matrix)
    chosen = order(values.real, which)
    partner = {place: int((values - values[place].conj()).abs().argmin()) for place in chosen[:kept]}
    places = list(dict.fromkeys([*chosen[:kept], *partner.values()]))
    # The real and imaginary parts of a pair span the same as the pair, twice over.
    wanted = [vectors[:, n].imag if values[n].imag < 0 else vectors[:, n].real for n in places]
    basis: Tensor = torch.linalg.qr(torch.stack(wanted, dim=1)).Q
    return basis


def orthogonalised(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Take out of a vector what lies in the span of a basis: two passes of classical Gram-Schmidt.

    Args:
        basis: shape (m, n), orthonormal rows.
        w: shape (n,).

    Returns:
        The rest, and the coefficients, shape (m,).
    """
    first = basis @ w
    w = torch.addmv(w, basis.T, first, alpha=-1)
    second = basis @ w
    return torch.addmv(w, basis.T, second, alpha=-1), first + second


def order(values: Tensor, which: str) -> list[int]:
    """Order eigenvalues by what is wanted.

    Args:
        values: shape (m,).
        which: ``"magnitude"``: largest absolute value first. ``"largest"``, ``"smallest"``: by the value itself.

    Returns:
        Their places, the most wanted first.
    """
    key = {"magnitude": values.abs(), "largest": values, "smallest": -values}[which]
    places: list[int] = torch.argsort(key, descending=True, stable=True).tolist()
    return places


def start_vector(n: int, seed: int, names: Sequence[str | int], like: Tensor) -> Tensor:
    """Draw a start vector, uniform on the unit sphere, the same on every process and device.

    Args:
        n: its length.
        seed: of the measure.
        names: what it is for.
        like: whose dtype and device.

    Returns:
        Shape (n,).
    """
    drawn = torch.randn(n, generator=stream(seed, *names), dtype=torch.float64)
    return drawn.div(drawn.norm()).to(like)
