"""The images of `flatwise compare`, whole in memory as standardised floats."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flatwise.errors import UnknownNameError
from flatwise.lab.images import load_images
from flatwise.lab.sets.memory import InMemory
from flatwise.lab.sets.small import DIGITS_LEVELS

# By how many pixels the basic augmentation shifts an image here; the paper's pads Fashion-MNIST by 4.
PADDING = {"digits": 1, "fashion-mnist": 2}
# Gray levels above black in the files.
LEVELS = {"digits": DIGITS_LEVELS, "fashion-mnist": 255}


@dataclass(frozen=True, eq=False)
class ImageData:
    """One data set: a training part and a test part, standardised by the training part's mean and deviation.

    Attributes:
        name: as on the command line.
        train_inputs: float32, (images, 1, height, width).
        train_labels: int64, (images,).
        test_inputs: like the training inputs.
        test_labels: like the training labels.
        classes: number of classes.
        flips: whether a mirrored image keeps its class.
        padding: by how many pixels the basic augmentation may shift an image.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int
    flips: bool
    padding: int


@lru_cache(maxsize=3)
def load_data(name: str, root: str | None = None) -> ImageData:
    """Load a data set; the second call for the same one returns the same object.

    Args:
        name: ``"digits"`` or ``"fashion-mnist"``.
        root: folder to look in first (fashion-mnist only).

    Returns:
        The data.

    Raises:
        UnknownNameError: there is no such data set.
    """
    if name not in PADDING:
        raise UnknownNameError("data set", name, PADDING)
    images = load_images(name, root)
    assert isinstance(images.train, InMemory)
    assert isinstance(images.test, InMemory)
    train, test = (_values(part.images, LEVELS[name]) for part in (images.train, images.test))
    mean, deviation = train.mean(), train.std()
    return ImageData(
        name=name,
        train_inputs=(train - mean) / deviation,
        train_labels=images.train_labels,
        test_inputs=(test - mean) / deviation,
        test_labels=images.test_labels,
        classes=images.classes,
        flips=images.flips,
        padding=PADDING[name],
    )


def _values(images: Tensor, levels: int) -> Tensor:
    # the bytes are the levels, stretched to 255 and rounded: this gives exactly what the file has
    return (images.to(torch.float32) * (levels / 255)).round() / levels
