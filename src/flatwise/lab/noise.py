"""Wrong labels: an exact share of them, symmetric or to the next class, or those that people gave (CIFAR-N).

The labels of the training images that are not held out become wrong; those of the validation and the test part stay
right. What was done is a ``NoiseReport``, which a run records.

Sources: symmetric and pair-flip noise as in Han et al. 2018 (arXiv 1804.06872); files as Wei et al. 2022
(arXiv 2110.12088) publish them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.sets.sources import one_line
from flatwise.lab.split import with_noise
from flatwise.measure.fingerprint import fingerprint
from flatwise.seeds import stream

KINDS = ("symmetric", "asymmetric")
CLEAN = "clean_label"  # the key under which CIFAR-N's files have the right labels


@dataclass(frozen=True)
class NoiseReport:
    """What was done to the training labels.

    Attributes:
        kind: "none", "symmetric", "asymmetric" or "file".
        asked: the share that was asked for; None where a file has the labels.
        share: the share that is wrong.
        wrong: labels that are wrong.
        labels: all training labels, without the held-out part.
        file: the file and key, where a file has the labels.
        digest: sha256 of the labels that are trained on.
    """

    kind: str
    asked: float | None
    share: float
    wrong: int
    labels: int
    file: str | None
    digest: str

    def as_dict(self) -> dict[str, Any]:
        """Write the report as plain values.

        Returns:
            The fields by name.
        """
        return asdict(self)


def make_noisy(
    labels: Tensor,
    training: Tensor,
    classes: int,
    *,
    kind: Literal["symmetric", "asymmetric"] = "symmetric",
    share: float = 0.0,
    file: str | None = None,
    seed: int = 0,
) -> tuple[Tensor, NoiseReport]:
    """Give the labels to train on.

    Args:
        labels: the right labels of the data set's training images, int64, (images,).
        training: indices of the images that are trained on, in the order wanted; those that are held out are not among
            them, and stay right.
        classes: number of classes.
        kind: "symmetric" draws any other class, "asymmetric" takes the next class.
        share: part of the labels that becomes wrong, rounded to whole labels.
        file: "file.pt:key", "file.pt" or "file.npy" with one label for each image of ``labels``.
        seed: decides which labels become wrong, and what.

    Returns:
        New labels of the training images, int64, and what was done.

    Raises:
        UserError: a share and a file, or a share outside [0, 1).
        UnknownNameError: there is no such kind of noise.
    """
    if kind not in KINDS:
        raise UnknownNameError("noise", kind, KINDS)
    if not 0 <= share < 1:
        raise UserError(f"the share of wrong labels must be from 0 up to, not including, 1, not {share}")
    if share and file is not None:
        raise UserError("a noise file has the noisy labels: leave out the share")
    right = labels[training]
    if file is not None:
        noisy = read_noise_file(file, labels, classes)[training]
    elif kind == "symmetric":
        noisy = with_noise(right, share, classes, stream(seed, "noise"))
    else:
        noisy = with_pair_flips(right, share, classes, stream(seed, "noise"))
    wrong = int((noisy != right).sum())
    return noisy, NoiseReport(
        kind="file" if file is not None else kind if share else "none",
        asked=None if file is not None else share,
        share=wrong / len(right),
        wrong=wrong,
        labels=len(right),
        file=file,
        digest=fingerprint([noisy]),
    )


def with_pair_flips(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Make an exact share of labels wrong, each by the next class, and the same share of every class.

    Args:
        labels: right labels, (samples,).
        share: part that becomes wrong; the count is rounded to the nearest whole number, that of each class down or up.
        classes: number of classes; after the last comes the first.
        generator: decides which.

    Returns:
        New labels.
    """
    members = torch.bincount(labels, minlength=classes)
    counts = (share * members.double()).floor().to(torch.int64)
    # What rounding down left over goes to the classes that lost most by it; the sort is stable, so ties have an order.
    left = round(share * len(labels)) - int(counts.sum())
    lost = share * members.double() - counts
    counts[lost.sort(descending=True, stable=True).indices[:left]] += 1
    noisy = labels.clone()
    for value in range(classes):
        place = (labels == value).nonzero().flatten()
        victims = place[torch.randperm(len(place), generator=generator)[: counts[value]]]
        noisy[victims] = (value + 1) % classes
    return noisy


def read_noise_file(file: str, labels: Tensor, classes: int) -> Tensor:
    """Read the labels that a file has.

    Args:
        file: "file.pt:key", a dictionary of arrays as CIFAR-N is published; "file.pt" where it has one noisy array;
            or "file.npy".
        labels: the right labels, to compare with those of the file where it has them.
        classes: number of classes.

    Returns:
        int64, (images,).

    Raises:
        UserError: the file is missing, unreadable, or for another data set.
        UnknownNameError: the file has no such key.
    """
    name, key = _name_and_key(file)
    if not Path(name).expanduser().is_file():
        raise UserError(f"there is no noise file {name}; --noise-file takes FILE.npy or FILE.pt:KEY")
    arrays = _arrays(Path(name).expanduser())
    clean = arrays.pop(CLEAN, None) if key != CLEAN else arrays.get(CLEAN)
    if key is None and len(arrays) > 1:
        raise UserError(f"{name} has several labels: name one of them, {name}:{' or :'.join(arrays)}")
    if key is not None and key not in arrays:
        raise UnknownNameError(f"key of {name}", key, arrays)
    found = _whole_numbers(name, next(iter(arrays.values())) if key is None else arrays[key])
    if found.shape != labels.shape:
        raise UserError(
            f"{name} has labels of shape {tuple(found.shape)}, and the data set {len(labels)} training images; it "
            "must have one label for each, in the data set's order"
        )
    if clean is not None and not torch.equal(_whole_numbers(name, clean), labels):
        raise UserError(
            f"{name} is for another data set or another order of its images: its {CLEAN} differs from the labels here"
        )
    if int(found.min()) < 0 or int(found.max()) >= classes:
        raise UserError(
            f"{name} has labels from {int(found.min())} to {int(found.max())}, and the {classes} classes run from 0 "
            f"to {classes - 1}"
        )
    return found


def _name_and_key(file: str) -> tuple[str, str | None]:
    # the colon of a drive letter is not followed by a key
    name, colon, key = file.rpartition(":")
    return (name, key) if colon and name.endswith((".pt", ".pth", ".npy")) else (file, None)


def _arrays(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return {"labels": np.load(file, allow_pickle=False)}
        # CIFAR-N's files are dictionaries of NumPy arrays; nothing else is let in, so a file cannot run code
        with torch.serialization.safe_globals(_numpy_names()):
            read = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"{path} holds something else than arrays, or is no file of torch.save: not read") from error
    except Exception as error:  # NumPy, torch and zipfile have no base class in common
        raise UserError(f"cannot read the noise file {path}: {one_line(error)[:200]}") from error
    found = read if isinstance(read, dict) else {"labels": read}
    arrays = {str(key): value for key, value in found.items() if isinstance(value, (np.ndarray, Tensor, list))}
    if not arrays:
        raise UserError(f"{path} has no labels: it must hold an array, or a dictionary of arrays")
    return arrays


def _numpy_names() -> list[Any]:
    # NumPy 1 wrote the same functions under numpy.core, NumPy 2 under numpy._core.
    rebuild = np.empty(0).__reduce__()[0]
    kinds = [
        type(np.dtype(name)) for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    ]
    return [
        *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        np.ndarray,
        np.dtype,
        *kinds,
    ]


def _whole_numbers(name: str, values: Any) -> Tensor:
    numbers = torch.as_tensor(values)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise UserError(f"{name} has labels of type {numbers.dtype}; they must be whole numbers")
    return numbers.to(torch.int64)
