"""From the stored uint8 images to what the network sees, over a whole batch and on its device.

The order is that of the SAM authors' code: crop of random size, AutoAugment or RandAugment, mirror and shift,
normalise, cutout. Every draw depends on the image's key alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.augment.basic import cutout, mirror_and_crop
from flatwise.lab.augment.inception import crop_boxes, resize_boxes
from flatwise.lab.augment.policies import POLICIES
from flatwise.lab.augment.policy import autoaugment_plans, follow, randaugment_plans

NAMES = ("basic", "cutout", "autoaugment", "randaugment", "inception")
# Two of these would do the same work twice.
EXCLUSIVE = (("basic", "inception"), ("autoaugment", "randaugment"))


class ImageFacts(Protocol):
    """What a data set says about its images.

    Attributes:
        mean: of each channel, for values from 0 to 1.
        std: standard deviation of each channel.
        flips: whether a mirrored image keeps its class.
        padding: by how many pixels an image may be shifted.
        policy: AutoAugment's policy for them: "cifar", "svhn" or "imagenet".
    """

    @property
    def mean(self) -> Sequence[float] | Tensor: ...  # noqa: D102
    @property
    def std(self) -> Sequence[float] | Tensor: ...  # noqa: D102
    @property
    def flips(self) -> bool: ...  # noqa: D102
    @property
    def padding(self) -> int: ...  # noqa: D102
    @property
    def policy(self) -> str: ...  # noqa: D102


def normalise(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Bring pixels to mean 0 and deviation 1 of each channel.

    Args:
        images: uint8, (batch, channels, height, width).
        mean: of each channel, for values from 0 to 1.
        std: standard deviation of each channel.

    Returns:
        float32, the same shape: (pixel / 255 - mean) / std. A black pixel becomes -mean / std.
    """
    centre, spread = (
        torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1).to(images.device, non_blocking=True)
        for value in (mean, std)
    )
    return images.to(torch.float32).div_(255).sub_(centre).div_(spread)


@dataclass(frozen=True)
class Pipeline:
    """The augmentations of one training, in their order.

    Attributes:
        names: which augmentations are done.
        facts: about the images.
        cutout: side of the square that cutout blanks, in pixels.
        cropped: the crop of random size was made where the images were read.
    """

    names: frozenset[str]
    facts: ImageFacts
    cutout: int = 16
    cropped: bool = False

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Augment and normalise.

        Args:
            images: uint8, (batch, channels, height, width), on any device and in any order of memory; they stay as
                they are.
            keys: int64, (batch,); best on the CPU, where the draws are made.

        Returns:
            float32, normalised, the same shape and device, contiguous.
        """
        height, width = images.shape[-2:]
        keys = keys.cpu()
        images = images.contiguous()
        if "inception" in self.names and not self.cropped:
            images = resize_boxes(images, crop_boxes(keys, height, width))
        if "autoaugment" in self.names:
            images = follow(images, autoaugment_plans(keys, self.facts.policy, height, width))
        if "randaugment" in self.names:
            images = follow(images, randaugment_plans(keys, height, width))
        if self.names & {"basic", "inception"}:
            padding = self.facts.padding if "basic" in self.names else 0
            images = mirror_and_crop(images, keys, flips=self.facts.flips, padding=padding)
        floats = self.normalise(images)
        return cutout(floats, keys, self.cutout) if "cutout" in self.names else floats

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise without augmenting, as for an evaluation.

        Args:
            images: uint8, (batch, channels, height, width).

        Returns:
            float32, the same shape.
        """
        return normalise(images, self.facts.mean, self.facts.std)


def build_pipeline(names: Sequence[str], facts: ImageFacts, *, cutout: int = 16, cropped: bool = False) -> Pipeline:
    """Put together the augmentations of one training.

    Args:
        names: any of ``NAMES``, in any order: the order in which they are done is fixed.
        facts: about the images, such as the data set itself.
        cutout: side of the square that cutout blanks, in pixels.
        cropped: the crop of random size was made where the images were read; "inception" then only mirrors.

    Returns:
        The pipeline.

    Raises:
        UnknownNameError: an augmentation or a policy that does not exist.
        UserError: two augmentations that exclude each other, or a square without pixels.
    """
    for name in names:
        if name not in NAMES:
            raise UnknownNameError("augmentation", name, NAMES)
    for pair in EXCLUSIVE:
        if set(pair) <= set(names):
            raise UserError(f"{pair[0]} and {pair[1]} exclude each other: name one of them")
    if "autoaugment" in names and facts.policy not in POLICIES:
        raise UnknownNameError("AutoAugment policy", facts.policy, POLICIES)
    if cutout < 1:
        raise UserError(f"cutout blanks a square of at least 1 pixel, not {cutout}: to blank none, leave cutout out")
    return Pipeline(frozenset(names), facts, cutout, cropped)
