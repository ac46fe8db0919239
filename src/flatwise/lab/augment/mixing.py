"""mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) over one batch.

Each image meets one partner of the same batch, given by a permutation; one share, drawn from Beta(alpha, alpha), holds
for the whole batch, as in both papers' code. The targets are the two labels in the same shares.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional

from flatwise.errors import UserError


def mix(
    images: Tensor, labels: Tensor, classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, key: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with another of the batch.

    Args:
        images: normalised images, (batch, channels, height, width); they stay as they are.
        labels: int64, (batch,).
        classes: number of classes.
        mixup: alpha of mixup; 0 is none.
        cutmix: alpha of CutMix; 0 is none.
        key: decides partners, share and box; the global random state has no part in it.

    Returns:
        The mixed images, and the target probabilities, float32, (batch, classes).

    Raises:
        UserError: an alpha below 0, or both above 0.
    """
    if min(mixup, cutmix) < 0 or (mixup and cutmix):
        raise UserError(f"give mixup or cutmix a positive alpha, the other one 0, not {mixup} and {cutmix}")
    targets = functional.one_hot(labels, classes).to(torch.float32)
    if not mixup and not cutmix:
        return images, targets
    draws = random.Random(key)
    alpha = mixup or cutmix
    share = draws.betavariate(alpha, alpha)
    partners = torch.randperm(len(images), generator=torch.Generator().manual_seed(draws.getrandbits(63)))
    partners = partners.to(images.device, non_blocking=True)
    if mixup:
        mixed = images * share + images[partners] * (1 - share)
    else:
        top, bottom, left, right = cutmix_box(draws, share, *images.shape[-2:])
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[partners, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    return mixed, targets * share + targets[partners] * (1 - share)


def cutmix_box(draws: random.Random, share: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Draw the box that the partner fills: its centre is any pixel, its area before clipping ``1 - share``.

    Args:
        draws: gives the centre.
        share: of the image that is to stay.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        Top, bottom, left and right, clipped to the image; bottom and right lie outside the box.
    """
    half_height, half_width = (int(size * (1 - share) ** 0.5) // 2 for size in (height, width))
    row, column = draws.randrange(height), draws.randrange(width)
    return (
        max(row - half_height, 0), min(row + half_height, height),
        max(column - half_width, 0), min(column + half_width, width),
    )  # fmt: skip
