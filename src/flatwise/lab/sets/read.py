"""What reading a data set gives, whether its images are in memory or on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from flatwise.lab.sets.disk import OnDisk
from flatwise.lab.sets.memory import InMemory

Part = TypeVar("Part", InMemory, OnDisk)


@dataclass(frozen=True, eq=False)
class ReadSet(Generic[Part]):
    """A data set as its files have it.

    Attributes:
        train: training images.
        train_labels: int64, (images,).
        test: test images.
        test_labels: int64, (images,).
        class_names: in the order of the labels.
    """

    train: Part
    train_labels: Tensor
    test: Part
    test_labels: Tensor
    class_names: tuple[str, ...]
