"""One form for every data set: a training and a test part that hand out batches of uint8 images by index."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.sets.disk import OnDisk
from flatwise.lab.sets.memory import InMemory, mean_and_deviation
from flatwise.lab.sets.read import ReadSet
from flatwise.lab.sets.small import SMALL, read_small
from flatwise.lab.sets.trees import LARGE, list_folder, list_large

DATA_SETS = ("cifar10", "cifar100", "svhn", "svhn-core", "fashion-mnist", "mnist", "digits", *LARGE)
RESOLUTION = 224
# Of ImageNet's training part (the values that pretrained networks were trained with).
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A mirrored 2 or 7 is no digit.
NOT_MIRRORED = ("digits", "mnist", "svhn", "svhn-core")
PADDING_SHARE = 4 / 32  # 4 pixels of CIFAR's 32


@dataclass(frozen=True, eq=False)
class Images:
    """A data set.

    Attributes:
        name: as on the command line.
        train: training images; ``train.batch(indices, keys)`` is uint8, (batch, channels, height, width).
        train_labels: int64, (images,), in [0, classes).
        test: test images.
        test_labels: like the training labels.
        class_names: in the order of the labels.
        mean: of each channel of the training images, whose values run from 0 to 1.
        std: each channel's standard deviation.
        flips: whether a mirrored image keeps its class.
        padding: by how many pixels the basic augmentation pads an image before it crops.
        policy: the AutoAugment policy that was found for such images: "cifar", "svhn" or "imagenet".
    """

    name: str
    train: InMemory | OnDisk
    train_labels: Tensor
    test: InMemory | OnDisk
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool
    padding: int
    policy: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images of a batch."""
        return self.train.shape

    @property
    def on_disk(self) -> bool:
        """Whether images are decoded when they are needed; with keys, they then come cropped at random."""
        return isinstance(self.train, OnDisk)


def load_images(name: str, root: str | Path | None = None, *, resolution: int | None = None) -> Images:
    """Find a data set; small ones are read into memory, of large ones the files are listed.

    Args:
        name: one of ``DATA_SETS``, or the path of a folder that has train/ and test/ or val/, each with one folder
            per class.
        root: folder to look in first (see docs/datasets.md for what is looked for).
        resolution: side of the images of a batch, in pixels. Images on disk have 224 without it; those in memory keep
            their size.

    Returns:
        The data set; the second call for the same one does not read it again.

    Raises:
        UserError: the path is no folder, or the resolution no size.
        UnknownNameError: there is no such data set.
    """
    if resolution is not None and resolution < 1:
        raise UserError(f"the resolution must be at least 1, not {resolution}")
    folder = None if root is None else Path(root).expanduser()
    if name in SMALL:
        return _resized(_small_images(name, folder), resolution)
    if name in LARGE:
        return _large_images(name, folder, resolution or RESOLUTION)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder_images(name, path, resolution or RESOLUTION)
    if os.sep in name:
        raise UserError(f"there is no folder {name}; --dataset takes a name ({', '.join(DATA_SETS)}) or a folder")
    raise UnknownNameError("data set", name, DATA_SETS)


@lru_cache(maxsize=2)
def _small_images(name: str, root: Path | None) -> Images:
    read = read_small(name, root)
    mean, std = mean_and_deviation(read.train.images)
    return Images(
        name,
        **vars(read),
        mean=mean,
        std=std,
        flips=name not in NOT_MIRRORED,
        # the paper pads by 4 pixels; an eighth of the 8 pixels of a digit is 1
        padding=1 if name == "digits" else 4,
        policy="svhn" if name.startswith("svhn") else "cifar",
    )


def _resized(images: Images, resolution: int | None) -> Images:
    side = images.shape[-1]
    if resolution is None or resolution == side:
        return images
    assert isinstance(images.train, InMemory)
    assert isinstance(images.test, InMemory)
    return replace(
        images,
        train=replace(images.train, resolution=resolution),
        test=replace(images.test, resolution=resolution),
        padding=round(images.padding * resolution / side),
    )


@lru_cache(maxsize=2)
def _large_images(name: str, root: Path | None, resolution: int) -> Images:
    return _photographs(name, list_large(name, root, resolution))


@lru_cache(maxsize=2)
def _folder_images(name: str, folder: Path, resolution: int) -> Images:
    return _photographs(name, list_folder(folder, resolution))


def _photographs(name: str, listed: ReadSet[OnDisk]) -> Images:
    return Images(
        name,
        **vars(listed),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flips=True,
        padding=round(PADDING_SHARE * listed.train.resolution),
        policy="imagenet",
    )
