"""The images, whole in memory: which data sets there are and where each is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.idx import find_idx, read_idx
from flatwise.seeds import stream

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CACHE_FOLDER = Path("~/.cache/flatwise")
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DIGITS_TEST_SHARE = 0.2


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
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion_mnist(None if root is None else Path(root).expanduser())
    raise UnknownNameError("data set", name, ("digits", "fashion-mnist"))


@lru_cache(maxsize=1)
def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install 'flatwise[lab]'") from error
    bunch = load_digits()
    inputs = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    test = stratified_indices(labels, DIGITS_TEST_SHARE)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[test] = True
    # No mirror images: a mirrored 2 or 7 is no digit.
    return _standardised("digits", inputs[~held], labels[~held], inputs[held], labels[held], flips=False, padding=1)


def stratified_indices(labels: Tensor, share: float) -> Tensor:
    """Choose the same share of every class, the same one on every call and every machine.

    Args:
        labels: (samples,).
        share: part of each class to choose.

    Returns:
        Their indices, in rising order.
    """
    chosen = []
    for value in torch.unique(labels).tolist():
        members = (labels == value).nonzero().flatten()
        order = torch.randperm(len(members), generator=stream(0, "test split", int(value)))
        chosen.append(members[order[: round(share * len(members))]])
    return torch.cat(chosen).sort().values


def candidate_folders(root: Path | None) -> Iterator[Path]:
    """List the folders in which Fashion-MNIST may be, in the order in which they are tried.

    Args:
        root: what the user gave, if anything.

    Yields:
        Folders.
    """
    if root is not None:
        yield root / "FashionMNIST" / "raw"  # where torchvision keeps it
        yield root
    yield SYSTEM_FOLDER
    yield CACHE_FOLDER.expanduser() / "FashionMNIST" / "raw"


@lru_cache(maxsize=2)
def _fashion_mnist(root: Path | None) -> ImageData:
    for folder in candidate_folders(root):
        paths = [path for stem in FILES if (path := find_idx(folder, stem)) is not None]
        if len(paths) == len(FILES):
            return _from_idx(paths)
    target = root if root is not None else CACHE_FOLDER.expanduser()
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(target), download=True)
    # torchvision raises RuntimeError after its last mirror, urllib and the disk raise OSError.
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"Fashion-MNIST not found. Three ways to provide it: (1) its four IDX files, packed or not, in "
            f"{SYSTEM_FOLDER}; (2) the torchvision layout FashionMNIST/raw/ under --data-root (looked in "
            f"{root if root is not None else 'none given'}); (3) a connection, so that torchvision downloads "
            f"it (tried into {target}: {' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    folder = target / "FashionMNIST" / "raw"
    return _from_idx([path for stem in FILES if (path := find_idx(folder, stem)) is not None])


def _from_idx(paths: list[Path]) -> ImageData:
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in paths)
    for path, images, labels in (
        (paths[0], train_images, train_labels),
        (paths[2], test_images, test_labels),
    ):
        if len(images) != len(labels) or images.dim() != 3:
            raise UserError(f"{path} and its labels do not belong together: {len(images)} and {len(labels)} entries")
    return _standardised(
        "fashion-mnist",
        train_images.unsqueeze(1).to(torch.float32) / 255,
        train_labels.to(torch.int64),
        test_images.unsqueeze(1).to(torch.float32) / 255,
        test_labels.to(torch.int64),
        flips=True,
        padding=2,
    )


def _standardised(
    name: str,
    train_inputs: Tensor,
    train_labels: Tensor,
    test_inputs: Tensor,
    test_labels: Tensor,
    *,
    flips: bool,
    padding: int,
) -> ImageData:
    mean, deviation = train_inputs.mean(), train_inputs.std()
    return ImageData(
        name=name,
        train_inputs=(train_inputs - mean) / deviation,
        train_labels=train_labels,
        test_inputs=(test_inputs - mean) / deviation,
        test_labels=test_labels,
        classes=10,
        flips=flips,
        padding=padding,
    )
