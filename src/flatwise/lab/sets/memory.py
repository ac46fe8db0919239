"""Small data sets: all images in one uint8 tensor, from which a batch is one index_select."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatwise.errors import UserError

Plan = Iterable[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images of one size, in memory.

    Attributes:
        images: uint8, (images, channels, height, width).
        resolution: side to which the images of a batch are resized; None leaves them as they are.
    """

    images: Tensor
    resolution: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images of a batch."""
        channels, height, width = self.images.shape[1:]
        return (channels, height, width) if self.resolution is None else (channels, self.resolution, self.resolution)

    def to(self, device: torch.device | str) -> InMemory:
        """Move the images, so that batches are taken on the device.

        Args:
            device: where to.

        Returns:
            The same images there.
        """
        return replace(self, images=self.images.to(device))

    def batch(self, indices: Tensor, keys: Tensor | None = None) -> Tensor:
        """Take some images.

        Args:
            indices: int64, (batch,).
            keys: not used: nothing is drawn here.

        Returns:
            uint8, (batch, channels, height, width), on the device of the images.
        """
        taken = self.images.index_select(0, indices.to(self.images.device))
        if self.resolution is None or taken.shape[-2:] == (self.resolution, self.resolution):
            return taken
        from torchvision.transforms.v2 import functional

        resized: Tensor = functional.resize(taken, [self.resolution, self.resolution], antialias=True)
        return resized

    def batches(self, plan: Plan, workers: int = 0) -> Iterator[Tensor]:
        """Take one batch after the other.

        Args:
            plan: indices and keys of each batch.
            workers: not used: a batch is taken in microseconds.

        Yields:
            What ``batch`` returns.
        """
        for indices, keys in plan:
            yield self.batch(indices, keys)


def checked(title: str, images: Tensor, labels: Tensor, classes: int) -> InMemory:
    """Refuse images and labels that do not belong together.

    Args:
        title: the data set's name and part, for the error.
        images: uint8, (images, channels, height, width).
        labels: int64, (images,).
        classes: number of classes.

    Returns:
        The images as a part of a data set.

    Raises:
        UserError: the counts differ, there is no image, the shape or type is another, or a label is no class.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"{title}: images must be uint8 of shape (images, 1 or 3, height, width), not {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{title}: images and labels do not belong together: {len(images)} and {len(labels)} entries")
    check_labels(title, labels, classes)
    return InMemory(images.contiguous())


def check_labels(title: str, labels: Tensor, classes: int) -> None:
    """Refuse labels that are no classes.

    Args:
        title: the data set's name and part, for the error.
        labels: int64, (images,).
        classes: number of classes.

    Raises:
        UserError: a label is outside.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(f"{title}: labels run from {low} to {high}, and the {classes} classes from 0 to {classes - 1}")


def mean_and_deviation(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute each channel's mean and deviation exactly, of values in [0, 1].

    The sums are whole numbers, so they are the same in any order; one division rounds.

    Args:
        images: uint8, (images, channels, height, width).

    Returns:
        The means and the deviations (divided by the count), one of each a channel.
    """
    means, deviations = [], []
    values = list(range(256))
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.int64)
        for part in torch.split(images[:, channel], 10_000):  # a channel is not contiguous: copy a part of it at a time
            counts += torch.bincount(part.flatten(), minlength=256)
        found = counts.tolist()
        count = sum(found)
        total = sum(value * times for value, times in zip(values, found, strict=True))
        squares = sum(value * value * times for value, times in zip(values, found, strict=True))
        means.append(total / (255 * count))
        deviations.append(math.sqrt(count * squares - total * total) / (255 * count))
    return tuple(means), tuple(deviations)
