"""What one run trains, validates and is tested on: which images, and with which labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flatwise.errors import UserError
from flatwise.lab.augment import Pipeline, build_pipeline, sample_keys
from flatwise.lab.images import Images, load_images
from flatwise.lab.noise import make_noisy
from flatwise.lab.sets.memory import InMemory
from flatwise.lab.train.config import TrainConfig
from flatwise.measure.fingerprint import fingerprint
from flatwise.seeds import stream


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of one run.

    Attributes:
        images: the data set.
        pipeline: its augmentations.
        training: indices of the training images in the data set's training part.
        validation: indices of the held-out images there.
        labels: one label for each training image, some of them wrong on purpose.
        true_labels: what they were.
        noise: how the labels came to be, for the record.
        device: where batches go.
        workers: processes that read images from disk.
    """

    images: Images
    pipeline: Pipeline
    training: Tensor
    validation: Tensor
    labels: Tensor
    true_labels: Tensor
    noise: dict[str, Any]
    device: torch.device
    workers: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.images.shape

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.images.classes

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
        wrong = int((labels != self.true_labels).sum())
        counted = {"wrong": wrong, "share": wrong / len(labels), "digest": fingerprint([labels])}
        return replace(self, labels=labels, noise={**self.noise, **record, **counted})

    def augmented(self, seed: int, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Give training images as an epoch sees them.

        Args:
            seed: the run's.
            epoch: counted from 0.
            batches: positions among the training images, for each batch.

        Yields:
            (images, channels, height, width), float32, on the device.
        """
        indices = [self.training[positions] for positions in batches]
        keys = [sample_keys(seed, epoch, chosen) for chosen in indices]
        crops = keys if self.pipeline.cropped else [None] * len(keys)
        found = self.images.train.batches(list(zip(indices, crops, strict=True)), self.workers)
        for images, key in zip(found, keys, strict=True):
            yield self.pipeline(images.to(self.device, non_blocking=True), key)

    def plain(self, part: str, positions: Tensor) -> Tensor:
        """Give images as they are at test time.

        Args:
            part: "training", "validation" or "test".
            positions: which of its images.

        Returns:
            (images, channels, height, width), float32, on the device.
        """
        return next(self.plain_batches(part, [positions]))

    def plain_batches(self, part: str, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Give batches of images as they are at test time.

        Args:
            part: "training", "validation" or "test".
            batches: positions among its images, for each batch.

        Yields:
            (images, channels, height, width), float32, on the device.
        """
        where = self.images.test if part == "test" else self.images.train
        chosen = batches if part == "test" else [getattr(self, part)[positions] for positions in batches]
        for images in where.batches([(indices, None) for indices in chosen], self.workers):
            yield self.pipeline.normalise(images.to(self.device, non_blocking=True))

    def labels_of(self, part: str) -> Tensor:
        """Return the labels of a part.

        Args:
            part: "training", "validation" or "test".

        Returns:
            (images,), those of the training part as they are trained on.
        """
        if part == "test":
            return self.images.test_labels
        return self.labels if part == "training" else self.images.train_labels[self.validation]


def load_samples(config: TrainConfig, device: torch.device | str = "cpu") -> Samples:
    """Load the data, choose the subset, hold out the validation part, then make training labels wrong.

    The seed alone decides all draws; they are those of ``flatwise compare``.

    Args:
        config: the settings.
        device: where batches go; images that are in memory go there as a whole.

    Returns:
        The samples.

    Raises:
        UserError: the sizes leave nothing to train or to validate on.
    """
    images = load_images(config.dataset, config.data_root, resolution=config.resolution)
    if isinstance(images.train, InMemory) and isinstance(images.test, InMemory):
        images = replace(images, train=images.train.to(device), test=images.test.to(device))
    available = len(images.train_labels)
    size = available if config.train_size is None else config.train_size
    if size > available:
        raise UserError(f"--train-size {size} is more than the {available} training images of {images.name}")
    held = round(config.val_fraction * size)
    if held >= size or (config.val_fraction and not held):
        raise UserError(
            f"--val-fraction {config.val_fraction} of {size} images leaves {held} to validate and {size - held} to "
            "train on"
        )
    chosen = torch.randperm(available, generator=stream(config.seed, "split"))[:size]
    validation, training = chosen[:held], chosen[held:]
    labels, report = make_noisy(
        images.train_labels,
        training,
        images.classes,
        kind=config.noise,
        share=config.label_noise,
        file=config.noise_file,
        seed=config.seed,
    )
    cropped = images.on_disk and "inception" in config.augmentations
    pipeline = build_pipeline(config.augmentations, images, cutout=config.cutout, cropped=cropped)
    return Samples(
        images=images,
        pipeline=pipeline,
        training=training,
        validation=validation,
        labels=labels,
        true_labels=images.train_labels[training],
        noise=report.as_dict(),
        device=torch.device(device),
        workers=config.loader_workers,
    )
