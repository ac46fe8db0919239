"""Large data sets: a list of files, decoded when a batch needs them, ahead of time in processes of their own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flatwise.errors import TrainingError, UserError
from flatwise.lab.sets.decode import decode
from flatwise.lab.sets.memory import Plan
from flatwise.lab.sets.sources import one_line

AHEAD = 2  # batches that each process has ready


class BrokenImageError(UserError):
    """An image that cannot be decoded."""

    everywhere = False


class EndedReaderError(TrainingError):
    """A process that reads images, and ended on its own."""

    everywhere = False


@dataclass(frozen=True, eq=False)
class OnDisk:
    """Images of many sizes, in files.

    Attributes:
        folder: that all of them are in.
        files: their paths below it, as bytes in one array: a million Python strings would be copied into each process.
        resolution: side of the images of a batch, in pixels.
    """

    folder: Path
    files: np.ndarray[Any, np.dtype[np.bytes_]]
    resolution: int

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images of a batch."""
        return 3, self.resolution, self.resolution

    def path(self, index: int) -> Path:
        """Name the file of an image.

        Args:
            index: of the image.

        Returns:
            Its path.
        """
        return self.folder / os.fsdecode(self.files[index])

    def batch(self, indices: Tensor, keys: Tensor | None = None) -> Tensor:
        """Decode some images, here and now.

        Args:
            indices: int64, (batch,).
            keys: int64, (batch,), each decides a random crop; None takes the centre of each.

        Returns:
            uint8, (batch, 3, resolution, resolution), on the CPU.
        """
        return torch.stack([decode(self.path(index), self.resolution, key) for index, key in _pairs(indices, keys)])

    def batches(self, plan: Plan, workers: int = 0) -> Iterator[Tensor]:
        """Decode one batch after the other, the next ones while the caller computes.

        Args:
            plan: indices and keys of each batch.
            workers: processes; 0 decodes in this one, when a batch is asked for.

        Yields:
            What ``batch`` returns, in the order of the plan, whatever the number of processes.

        Raises:
            BrokenImageError: an image is broken.
            EndedReaderError: a process ended on its own, as where memory runs out.
        """
        ready = self._start(plan, workers)
        try:
            for found in ready:
                if isinstance(found, str):
                    raise BrokenImageError(found)
                yield found
        except RuntimeError as error:
            raise EndedReaderError(
                f"a process that reads images ended: {one_line(error)}; use fewer --loader-workers, or 0"
            ) from error
        finally:
            # ends the processes now; the traceback of an error would keep them
            del ready

    def _start(self, plan: Plan, workers: int) -> Iterator[Tensor | str]:
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork where there are threads, and torch has some; a child here only decodes.
            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
            # More processes than processors are the user's choice: they wait for the disk too.
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            loader: DataLoader[Tensor | str] = DataLoader(
                _Batches(self),
                batch_sampler=_Plan(plan),
                num_workers=workers,
                prefetch_factor=AHEAD if workers else None,
                collate_fn=_as_it_is,
                # else the loader would draw the seeds of its processes from torch's own generator
                generator=torch.Generator(),
            )
            return iter(loader)


class _Plan(Iterable[list[tuple[int, int | None]]]):
    """The plan as the loader wants it: a list of what to decode for each batch."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[list[tuple[int, int | None]]]:
        for indices, keys in self.plan:
            yield _pairs(indices, keys)


class _Batches(Dataset[Tensor]):
    """What a process does: decode a batch, or return the text of what is wrong.

    An error that is raised in a process of the loader would arrive with the process's traceback as its text.
    """

    def __init__(self, part: OnDisk) -> None:
        self.part = part

    def __getitems__(self, wanted: Sequence[tuple[int, int | None]]) -> Tensor | str:
        try:
            return torch.stack([decode(self.part.path(index), self.part.resolution, key) for index, key in wanted])
        except UserError as error:
            return str(error)


def _pairs(indices: Tensor, keys: Tensor | None) -> list[tuple[int, int | None]]:
    chosen: list[int | None] = [None] * len(indices) if keys is None else keys.tolist()
    return list(zip(indices.tolist(), chosen, strict=True))


def _as_it_is(batch: Any) -> Any:
    return batch
