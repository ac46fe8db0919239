"""What one run trains, validates and is tested on: which images, and with which labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flatwise.errors import UserError
from flatwise.lab.augment import augment
from flatwise.lab.data import ImageData, load_data
from flatwise.lab.split import with_noise
from flatwise.lab.train.config import TrainConfig
from flatwise.seeds import stream


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of one run.

    Attributes:
        data: the data set.
        training: indices of the training images in the data set's training part.
        validation: indices of the held-out images there.
        labels: one label for each training image, some of them wrong on purpose.
        true_labels: what they were.
        noise: how the labels came to be, for the record.
    """

    data: ImageData
    training: Tensor
    validation: Tensor
    labels: Tensor
    true_labels: Tensor
    noise: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.data.train_inputs.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.data.classes

    @property
    def wrong(self) -> Tensor:
        """Boolean mask of the training images whose label is not the true one."""
        return self.labels != self.true_labels

    def with_labels(self, labels: Tensor, record: dict[str, Any]) -> Samples:
        """Replace the training labels.

        Args:
            labels: one for each training image.
            record: where they come from.

        Returns:
            The same samples with these labels.
        """
        return replace(self, labels=labels, noise={**self.noise, **record, **_count(labels, self.true_labels)})

    def augmented(self, config: TrainConfig, positions: Tensor, epoch: int) -> Tensor:
        """Gather training images as an epoch sees them.

        Args:
            config: its ``augment`` and ``seed`` are read.
            positions: which of the training images.
            epoch: counted from 0.

        Returns:
            (images, channels, height, width), float32.
        """
        indices = self.training[positions]
        images = self.data.train_inputs[indices]
        if "basic" not in config.augmentations:
            return images
        moved = [
            augment(image[None], self.data.padding, self.data.flips, stream(config.seed, "augmentation", epoch, index))
            for image, index in zip(images, indices.tolist(), strict=True)
        ]
        return torch.cat(moved)

    def plain(self, part: str, positions: Tensor) -> Tensor:
        """Gather images as they are at test time.

        Args:
            part: "training", "validation" or "test".
            positions: which of its images.

        Returns:
            (images, channels, height, width), float32.
        """
        if part == "test":
            return self.data.test_inputs[positions]
        return self.data.train_inputs[getattr(self, part)[positions]]

    def labels_of(self, part: str) -> Tensor:
        """Return the labels of a part.

        Args:
            part: "training", "validation" or "test".

        Returns:
            (images,), those of the training part as they are trained on.
        """
        if part == "test":
            return self.data.test_labels
        return self.labels if part == "training" else self.data.train_labels[self.validation]


def load_samples(config: TrainConfig) -> Samples:
    """Load the data, choose the subset, hold out the validation part, then make training labels wrong.

    The seed alone decides all draws; they are those of ``flatwise compare``.

    Args:
        config: the settings.

    Returns:
        The samples.

    Raises:
        UserError: the sizes leave nothing to train on.
    """
    set(config.augmentations) <= {"basic"} or _refuse(f"--augment {config.augment}")
    (config.noise == "symmetric" and config.noise_file is None) or _refuse("--noise asymmetric and --noise-file")
    data = load_data(config.dataset, config.data_root)
    available = len(data.train_labels)
    size = available if config.train_size is None else config.train_size
    if size > available:
        raise UserError(f"--train-size {size} is more than the {available} training images of {data.name}")
    held = round(config.val_fraction * size)
    if held >= size or (config.val_fraction and not held):
        raise UserError(f"{size} images with --val-fraction {config.val_fraction} leave {held} to validate on")
    chosen = torch.randperm(available, generator=stream(config.seed, "split"))[:size]
    validation, training = chosen[:held], chosen[held:]
    true_labels = data.train_labels[training]
    labels, kind = _noisy(config, true_labels, data.classes)
    record = {"kind": kind, "asked": config.label_noise, **_count(labels, true_labels)}
    return Samples(data, training, validation, labels, true_labels, record)


def _refuse(what: str) -> bool:
    raise UserError(f"{what}: not yet")


def _noisy(config: TrainConfig, labels: Tensor, classes: int) -> tuple[Tensor, str]:
    if not config.label_noise:
        return labels.clone(), "none"
    return with_noise(labels, config.label_noise, classes, stream(config.seed, "noise")), config.noise


def _count(labels: Tensor, true_labels: Tensor) -> dict[str, Any]:
    wrong = int((labels != true_labels).sum())
    return {"wrong": wrong, "share": wrong / len(labels), "digest": digest(labels)}


def digest(labels: Tensor) -> str:
    """Compress labels into one short word.

    Args:
        labels: whole numbers.

    Returns:
        Sixteen hexadecimal digits, the same for the same labels.
    """
    return hashlib.sha256(labels.to(torch.int64).numpy().tobytes()).hexdigest()[:16]
