"""Readers of the data sets that fit into memory: torchvision's for CIFAR and SVHN, IDX files for the MNIST family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatwise.errors import UserError
from flatwise.lab.idx import find_idx, read_idx
from flatwise.lab.sets.memory import InMemory, checked
from flatwise.lab.sets.read import ReadSet
from flatwise.lab.sets.sources import (
    SOURCES,
    DamagedDataError,
    MissingDataError,
    Source,
    candidates,
    download_folder,
)
from flatwise.seeds import stream

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DIGITS_TEST_SHARE = 0.2
DIGITS_LEVELS = 16
# The arguments of torchvision's class for the training part, which may have several, and the test part.
SPLITS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "cifar10": ([{"train": True}], {"train": False}),
    "cifar100": ([{"train": True}], {"train": False}),
    "svhn": ([{"split": "train"}, {"split": "extra"}], {"split": "test"}),
    "svhn-core": ([{"split": "train"}], {"split": "test"}),
}
SMALL = ("digits", "mnist", "fashion-mnist", *SPLITS)


def read_small(name: str, root: Path | None) -> ReadSet[InMemory]:
    """Read a data set into memory.

    Args:
        name: one of ``SMALL``.
        root: folder to look in first.

    Returns:
        The data set.
    """
    if name == "digits":
        return _digits()
    if name in SPLITS:
        return _by_torchvision(name, root)
    return _from_idx(name, root)


def _digits() -> ReadSet[InMemory]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install 'flatwise[lab]'") from error
    bunch = load_digits()
    # 0 .. 16 is stretched to 0 .. 255; rounding back gives the levels again
    images = (torch.from_numpy(bunch.images).unsqueeze(1) * (255 / DIGITS_LEVELS)).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[stratified_indices(labels, DIGITS_TEST_SHARE)] = True
    return _small("digits", (images[~held], labels[~held]), (images[held], labels[held]), map(str, range(10)))


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


def _by_torchvision(name: str, root: Path | None) -> ReadSet[InMemory]:
    source, (train_splits, test_split) = SOURCES[name], SPLITS[name]
    reader = torchvision_reader(source.reader)
    found = find(source, root)
    folder = found if found is not None else download_folder(root)
    try:
        parts = [reader(str(folder), download=found is None, **split) for split in (*train_splits, test_split)]
    except Exception as error:  # torchvision, pickle, scipy and urllib have no base class in common
        if found is None:
            raise MissingDataError(source, root, error) from error
        raise DamagedDataError(source, folder, error) from error
    *train, test = (_tensors(part) for part in parts)
    images, labels = (torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*train, strict=True))
    names = getattr(parts[0], "classes", map(str, range(10)))
    return _small(f"{source.title} in {folder}", (images, labels), test, names)


def _tensors(part: Any) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(part.data)
    # CIFAR's class keeps the channels last, SVHN's does not
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    return images, torch.as_tensor(part.labels if hasattr(part, "labels") else part.targets, dtype=torch.int64)


def _from_idx(name: str, root: Path | None) -> ReadSet[InMemory]:
    from torchvision.datasets import mnist

    source = SOURCES[name]
    folder = _idx_folder(source, root)
    if folder is None:
        try:
            torchvision_reader(source.reader)(str(download_folder(root)), download=True)
        # torchvision raises RuntimeError after its last mirror, urllib and the disk raise OSError
        except (RuntimeError, OSError) as error:
            raise MissingDataError(source, root, error) from error
        folder = download_folder(root) / source.reader / "raw"
    paths = [path for stem in IDX_FILES if (path := find_idx(folder, stem)) is not None]
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in paths)
    return _small(
        f"{source.title} in {folder}",
        (train_images[:, None], train_labels.to(torch.int64)),
        (test_images[:, None], test_labels.to(torch.int64)),
        getattr(mnist, source.reader).classes,
    )


def _idx_folder(source: Source, root: Path | None) -> Path | None:
    for folder in candidates(source, root):
        if all(find_idx(folder, stem) is not None for stem in IDX_FILES):
            return folder
    return None


def _small(title: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], names: Any) -> ReadSet[InMemory]:
    named = tuple(names)
    return ReadSet(
        train=checked(f"{title}, training part", *train, len(named)),
        train_labels=train[1],
        test=checked(f"{title}, test part", *test, len(named)),
        test_labels=test[1],
        class_names=named,
    )


def find(source: Source, root: Path | None) -> Path | None:
    """Find the folder that has a data set's files.

    Args:
        source: the data set.
        root: folder to look in first.

    Returns:
        The folder that holds the marker, or None.
    """
    return next((folder for folder in candidates(source, root) if (folder / source.marker).exists()), None)


def torchvision_reader(name: str) -> Any:
    """Get one of torchvision's classes of data sets.

    Args:
        name: of the class.

    Returns:
        The class.

    Raises:
        UserError: torchvision is not installed.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UserError("data sets are read by torchvision: pip install 'flatwise[lab]'") from error
    return getattr(datasets, name)
