"""The weights that a training run went through, and the plane in which most of its way lies.

Principal components are those of the recorded weights about their mean. They are found from the matrix of inner
products between the records, which is small: one row for each record. The share of the variance that a component
explains tells how much of the way the picture shows; high shares are usual even for random walks in many dimensions
(Antognini and Sohl-Dickstein, NeurIPS 2018), so that they say little about the loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.errors import UserError
from flatwise.files import write_atomically
from flatwise.measure.select import Parameters, selected


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Recorded weights.

    Attributes:
        steps: after how many training steps each record was made.
        weights: the parameters by name, of each record, on the CPU.
    """

    steps: tuple[int, ...]
    weights: tuple[dict[str, Tensor], ...]

    @staticmethod
    def load(folder: str | Path) -> Trajectory:
        """Read what a :class:`TrajectoryRecorder` wrote.

        Args:
            folder: its folder.

        Returns:
            The trajectory.

        Raises:
            UserError: if there is no record.
        """
        found = _records(Path(folder))
        if not found:
            raise UserError(
                f"{folder} holds no record of weights: give a TrajectoryRecorder this folder while training"
            )
        return Trajectory(tuple(found), tuple(torch.load(path, weights_only=True) for path in found.values()))


class TrajectoryRecorder:
    """Records the weights of a model during training, for ``landscape(..., directions="pca")``.

    Call :meth:`step` after every training step. The weights at the start are recorded, too.

    Args:
        model: whose weights.
        every: record after every so many steps.
        folder: where each record becomes a file, so that an interrupted training can be continued; None keeps them in
            memory.
        start: the number of steps taken before; records of later ones are removed from the folder.
        parameters: which parameters; None: all that are trainable.

    Raises:
        UserError: if ``every`` is not a whole number >= 1.
    """

    def __init__(
        self,
        model: Module,
        every: int = 1,
        *,
        folder: str | Path | None = None,
        start: int = 0,
        parameters: Parameters = None,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise UserError(f"every must be a whole number >= 1, got {every!r}")
        self._params, _ = selected(model, parameters)
        self._every, self._steps = every, start
        self._folder = None if folder is None else Path(folder)
        self._kept: dict[int, dict[str, Tensor]] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for step, path in _records(self._folder).items():
                if step > start:
                    path.unlink()
        if start % every == 0:
            self._record()

    def step(self) -> None:
        """Count a training step, and record the weights where it is due."""
        self._steps += 1
        if self._steps % self._every == 0:
            self._record()

    def _record(self) -> None:
        weights = {name: p.detach().to("cpu", copy=True) for name, p in self._params.items()}
        if self._folder is None:
            self._kept[self._steps] = weights
        else:
            path = self._folder / f"weights-{self._steps:09d}.pt"
            write_atomically(path, lambda file: torch.save(weights, file))

    @property
    def trajectory(self) -> Trajectory:
        """What was recorded so far."""
        if self._folder is not None:
            return Trajectory.load(self._folder)
        return Trajectory(tuple(self._kept), tuple(self._kept.values()))


def _records(folder: Path) -> dict[int, Path]:
    found = [(re.fullmatch(r"weights-(\d+)\.pt", path.name), path) for path in sorted(folder.glob("weights-*.pt"))]
    return {int(match[1]): path for match, path in found if match is not None}


def principal(rows: Sequence[Tensor], count: int) -> tuple[list[Tensor], tuple[float, ...]]:
    """Find the principal components of vectors about their mean.

    Args:
        rows: at least three vectors, shape (weights,) each.
        count: how many components.

    Returns:
        Unit vectors in float64, whose largest entry is positive, and the share of the variance of each.

    Raises:
        UserError: if the vectors do not span so many dimensions.
    """
    matrix = torch.stack([row.double() for row in rows])
    matrix -= matrix.mean(dim=0)
    variances, columns = torch.linalg.eigh(matrix @ matrix.T)
    variances, columns = variances.flip(0), columns.flip(1)
    if len(rows) <= count or not float(variances[count - 1]) > 1e-12 * float(variances[0].clamp_min(1e-300)):
        raise UserError(f"the {len(rows)} recorded weights span fewer than {count} dimensions: record more of them")
    found = []
    for number in range(count):
        vector = matrix.T @ columns[:, number]
        vector = vector / vector.norm()
        found.append(vector * torch.sign(vector[vector.abs().argmax()]))
    return found, tuple((variances[:count] / variances.clamp_min(0).sum()).tolist())
