"""Lists of the data sets that stay on disk: torchvision's classes name each file and its label, nothing is decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flatwise.errors import UserError
from flatwise.lab.sets.disk import OnDisk
from flatwise.lab.sets.memory import check_labels
from flatwise.lab.sets.read import ReadSet
from flatwise.lab.sets.small import find, torchvision_reader
from flatwise.lab.sets.sources import SOURCES, DamagedDataError, MissingDataError, one_line

# The splits of torchvision's class that are the training part, and the test part.
SPLITS = {
    "aircraft": (("trainval",), "test"),
    "flowers": (("train", "val"), "test"),
    "pets": (("trainval",), "test"),
    "cars": (("train",), "test"),
    "food101": (("train",), "test"),
}
FOLDERS = {"imagenet": ("val",), "birdsnap": ("test", "val")}
LARGE = (*FOLDERS, *SPLITS)


def list_large(name: str, root: Path | None, resolution: int) -> ReadSet[OnDisk]:
    """List a named data set.

    Args:
        name: one of ``LARGE``.
        root: folder to look in first.
        resolution: side of the images of a batch, in pixels.

    Returns:
        The data set.

    Raises:
        MissingDataError: it is not there.
        DamagedDataError: its reader refuses it, or an image is missing.
    """
    source = SOURCES[name]
    folder = find(source, root)
    if folder is None:
        raise MissingDataError(source, root)
    if name in FOLDERS:
        return list_folder(folder, resolution, FOLDERS[name])
    reader = torchvision_reader(source.reader)
    train_splits, test_split = SPLITS[name]
    folder = folder.absolute()
    try:
        parts = [reader(folder, split=split) for split in (*train_splits, test_split)]
    except Exception as error:  # torchvision, scipy and the parsing of text have no base class in common
        raise DamagedDataError(source, folder, error) from error
    *train, test = (_files(part) for part in parts)
    files = [file for paths, _ in train for file in paths]
    labels = [label for _, found in train for label in found]
    listed = [*files, *test[0]]
    absent = [path for path in listed if not os.path.exists(path)]
    if absent:
        what = f"{len(absent)} of the {len(listed)} images that it lists are missing, first {absent[0]}"
        raise DamagedDataError(source, folder, FileNotFoundError(what))
    return _large(folder, resolution, (files, labels), test, tuple(parts[0].classes))


def list_folder(folder: Path, resolution: int, test_names: Sequence[str] = ("test", "val")) -> ReadSet[OnDisk]:
    """List a folder of classes: train/ and test/ or val/, each with one folder per class.

    Args:
        folder: that has the parts.
        resolution: side of the images of a batch, in pixels.
        test_names: names of the test part; the first that is there is taken.

    Returns:
        The data set; the classes are those of train/, in alphabetical order.

    Raises:
        UserError: a part is missing, a class has no image, or the test part has a class that train/ lacks.
    """
    reader = torchvision_reader("ImageFolder")
    folder = folder.absolute()
    test_name = next((name for name in test_names if (folder / name).is_dir()), None)
    if test_name is None or not (folder / "train").is_dir():
        parts = " or ".join(f"{name}/" for name in test_names)
        raise UserError(
            f"{folder} is no folder of classes: it must have train/ and {parts}, each with one folder per class and "
            "the images in it"
        )
    try:
        train, test = reader(str(folder / "train")), reader(str(folder / test_name))
    except OSError as error:  # torchvision raises FileNotFoundError where a class is empty, or there is none
        raise UserError(f"{folder} is no folder of classes: {one_line(error)}") from error
    strange = sorted(set(test.classes) - set(train.classes))
    if strange:
        raise UserError(f"{folder / test_name} has the class {strange[0]!r}, which {folder / 'train'} does not have")
    return _large(
        folder,
        resolution,
        ([path for path, _ in train.samples], train.targets),
        # where the test part lacks a class, its own numbers are others than those of train/
        ([path for path, _ in test.samples], [train.class_to_idx[test.classes[label]] for label in test.targets]),
        tuple(train.classes),
    )


def _files(part: Any) -> tuple[list[str], list[int]]:
    # torchvision has no public list of the files
    if hasattr(part, "_samples"):
        return [str(path) for path, _ in part._samples], [int(label) for _, label in part._samples]
    paths = part._images if hasattr(part, "_images") else part._image_files
    return [str(path) for path in paths], [int(label) for label in part._labels]


def _large(
    folder: Path,
    resolution: int,
    train: tuple[list[str], list[int]],
    test: tuple[list[str], list[int]],
    names: tuple[str, ...],
) -> ReadSet[OnDisk]:
    parts = []
    for title, (paths, labels) in (("training", train), ("test", test)):
        if len(paths) != len(labels) or not paths:
            raise UserError(
                f"{folder}, {title} part: images and labels do not belong together: {len(paths)} and {len(labels)} "
                "entries"
            )
        numbers = torch.tensor(labels, dtype=torch.int64)
        check_labels(f"{folder}, {title} part", numbers, len(names))
        start = len(str(folder)) + 1
        files = np.array([os.fsencode(path[start:]) for path in paths])
        parts.append((OnDisk(folder, files, resolution), numbers))
    return ReadSet(*parts[0], *parts[1], names)
