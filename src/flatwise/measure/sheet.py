"""One model on a line or plane: its weights are put to ``w + a d1 + b d2``, and its loss is measured there.

Every point is counted from the same copy of the weights, so that it does not depend on the points before it. Writing
the weights costs as much as adding two vectors; there is no other model.

Batch normalisation needs a word. Its running statistics belong to the weights that gathered them. With other weights
they normalise wrongly, and the loss climbs for that reason alone, so that a landscape with *frozen* statistics shows
the statistics more than the network. *Recompute* gathers them anew at every point (a second forward pass; Izmailov et
al., UAI 2018, did so for averaged weights); *batch* normalises each part by its own statistics, as training does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from flatwise.errors import UserError
from flatwise.measure.problem import Problem

BatchNorm = Literal["frozen", "recompute", "batch"]


class Sheet:
    """The points ``w + a d1 + b d2`` of one model. To be used inside ``with``.

    Args:
        problem: the model, the loss and the samples.
        directions: shape (weights,) each.
        batch_norm: which statistics batch normalisation uses.

    Raises:
        UserError: ``batch_norm`` is unknown.
    """

    def __init__(self, problem: Problem, directions: Sequence[Tensor], batch_norm: BatchNorm) -> None:
        if batch_norm not in ("frozen", "recompute", "batch"):
            raise UserError(f"batch_norm must be 'frozen', 'recompute' or 'batch', got {batch_norm!r}")
        self.problem = problem
        self._origin = problem.flat(problem.params)
        self._directions = list(directions)
        self._point = torch.empty_like(self._origin)
        sizes = [p.numel() for p in problem.params]
        self._views = [
            piece.view(p.shape) for piece, p in zip(torch.split(self._point, sizes), problem.params, strict=True)
        ]
        same = all(p.dtype == problem.dtype and p.device == problem.device for p in problem.params)
        pieces = [problem.shaped(vector) for vector in (self._origin, *self._directions)] if same else []
        self._pieces = list(zip(problem.params, *pieces, strict=True)) if same else None
        self._norms = norms_of(problem)
        self._momenta = [norm.momentum for norm in self._norms]
        self.batch_norm = batch_norm
        self._open = problem.open()

    def __enter__(self) -> Sheet:
        """Put the model into its mode."""
        self._open.__enter__()
        self._normalise_by_batch(self.batch_norm == "batch")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put back the weights, bit for bit, and the rest."""
        self._point.copy_(self._origin)
        self._write()
        for norm, momentum in zip(self._norms, self._momenta, strict=True):
            norm.momentum = momentum
        self._open.__exit__(kind, error, trace)

    @torch.no_grad()
    def _write(self) -> None:
        torch._foreach_copy_(self.problem.params, self._views)

    def _normalise_by_batch(self, on: bool) -> None:
        for norm in self._norms:
            norm.training = on

    def loss_at(self, coordinates: Sequence[float]) -> tuple[float, float]:
        """Measure the loss at a point.

        Args:
            coordinates: one for each direction.

        Returns:
            The loss over all samples of all processes, and its standard error, estimated from the spread between the
            parts; NaN where there is one part.
        """
        if self._pieces is None:  # half precision is rounded once, at the end
            self._go(coordinates)
            self._write()
        else:
            self._write_directly(coordinates)
        return self._measured()

    @torch.no_grad()
    def _write_directly(self, coordinates: Sequence[float]) -> None:
        """Write without a vector between, which a large network would notice."""
        assert self._pieces is not None
        for p, origin, first, *rest in self._pieces:
            torch.add(origin, first, alpha=coordinates[0], out=p)
            for factor, piece in zip(coordinates[1:], rest, strict=True):
                p.add_(piece, alpha=factor)

    def _go(self, coordinates: Sequence[float]) -> None:
        self._point.copy_(self._origin)
        for factor, direction in zip(coordinates, self._directions, strict=True):
            self._point.add_(direction, alpha=factor)

    def distance(self, weights: Tensor, coordinates: Sequence[float]) -> float:
        """Say how far weights are from a point of the sheet.

        Args:
            weights: shape (weights,).
            coordinates: of the point.

        Returns:
            The Euclidean distance.
        """
        self._go(coordinates)
        return float((weights.double() - self._point.double()).norm())

    @property
    def origin(self) -> Tensor:
        """The model's weights, where the coordinates are zero."""
        return self._origin

    def loss_with(self, weights: Tensor) -> tuple[float, float]:
        """Measure the loss at other weights, which need not lie on the sheet.

        Args:
            weights: shape (weights,).

        Returns:
            As :meth:`loss_at`.
        """
        self._point.copy_(weights)
        self._write()
        return self._measured()

    def _measured(self) -> tuple[float, float]:
        if self._norms and self.batch_norm == "recompute":
            self._gather()
        problem = self.problem
        losses = problem.losses()
        shares = torch.tensor([problem.share(part) for part in problem.parts], dtype=torch.float64)
        loss = problem.summed((losses * shares).sum().to(problem.device))
        spread = torch.stack(
            [(shares * (losses - loss.cpu())).square().sum(), torch.tensor(float(len(losses))).double()]
        )
        square, count = problem.summed(spread.to(problem.device)).tolist()
        return float(loss), math.sqrt(square * count / (count - 1)) if count > 1 else math.nan

    def _gather(self) -> None:
        """Gather the running statistics anew: the mean over the parts of all processes."""
        for norm in self._norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all, not an exponential average
        self._normalise_by_batch(True)
        self.problem.losses()
        self._normalise_by_batch(False)
        if self.problem.group is None:
            return
        here = float(len(self.problem.parts))
        parts = float(self.problem.summed(torch.tensor(here, device=self.problem.device)))
        with torch.no_grad():
            for norm in self._norms:
                for statistic in (norm.running_mean, norm.running_var):
                    assert statistic is not None
                    statistic.copy_(self.problem.summed(statistic * (here / parts)))

    def tensors(self) -> list[Tensor]:
        """Return all that the loss at a point depends on, but the samples.

        Returns:
            Weights, directions, parameters that stay, buffers.
        """
        moved = {id(p) for p in self.problem.params}
        rest = [p for p in self.problem.model.parameters() if id(p) not in moved]
        return [self._origin, *self._directions, *rest, *self.problem.model.buffers()]


def norms_of(problem: Problem) -> list[_BatchNorm]:
    """Find the layers that keep running statistics.

    Args:
        problem: whose model.

    Returns:
        The batch normalisation layers with running statistics.
    """
    return [m for m in problem.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
