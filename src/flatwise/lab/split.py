"""What one seed trains on: a subset, its validation part, and the labels that were made wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatwise.errors import UserError
from flatwise.lab.data import ImageData
from flatwise.seeds import stream


@dataclass(frozen=True, eq=False)
class Split:
    """The training and validation samples of one seed; the test set is not in here.

    Attributes:
        inputs: training images.
        labels: training labels, some of them wrong on purpose.
        true_labels: what the training labels were.
        validation_inputs: held out from the training data.
        validation_labels: always right.
    """

    inputs: Tensor
    labels: Tensor
    true_labels: Tensor
    validation_inputs: Tensor
    validation_labels: Tensor

    @property
    def wrong(self) -> Tensor:
        """Boolean mask of the training samples whose label was made wrong."""
        return self.labels != self.true_labels


def make_split(
    data: ImageData, seed: int, *, train_size: int | None, validation_share: float, label_noise: float
) -> Split:
    """Draw the subset, hold out the validation part, then make training labels wrong.

    Args:
        data: the data set.
        seed: the run's seed; it alone decides all three draws.
        train_size: images to take from the training part, validation included; None takes all.
        validation_share: part of them that is held out.
        label_noise: part of the remaining labels that become wrong.

    Returns:
        The samples.

    Raises:
        UserError: the sizes leave nothing to train or to validate on.
    """
    available = len(data.train_labels)
    size = available if train_size is None else train_size
    if size > available:
        raise UserError(f"train-size {size} is more than the {available} training images of {data.name}")
    held = round(validation_share * size)
    if held < 1 or held >= size:
        raise UserError(f"train-size {size} with val-fraction {validation_share} leaves {size - held} to train on")
    chosen = torch.randperm(available, generator=stream(seed, "split"))[:size]
    validation, training = chosen[:held], chosen[held:]
    true_labels = data.train_labels[training]
    return Split(
        inputs=data.train_inputs[training],
        labels=with_noise(true_labels, label_noise, data.classes, stream(seed, "noise")),
        true_labels=true_labels,
        validation_inputs=data.train_inputs[validation],
        validation_labels=data.train_labels[validation],
    )


def with_noise(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Make an exact share of labels wrong, each by a uniformly drawn other class (symmetric noise).

    Args:
        labels: right labels, (samples,).
        share: part that becomes wrong; the count is rounded to the nearest whole number.
        classes: number of classes.
        generator: decides which and what.

    Returns:
        New labels.
    """
    count = round(share * len(labels))
    victims = torch.randperm(len(labels), generator=generator)[:count]
    shift = torch.randint(1, classes, (count,), generator=generator)
    noisy = labels.clone()
    # A shift by 1 .. classes - 1 never meets the class itself and meets each other class equally often.
    noisy[victims] = (noisy[victims] + shift) % classes
    return noisy
