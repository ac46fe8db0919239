"""Mirror, pad and crop; cutout: one index or one mask over the whole batch.

The recipe of the paper for small images: pad by 4 pixels, crop the old size at random, mirror half of them; and cutout
(DeVries, Taylor 2017, arXiv 1708.04552): blank a square whose centre is any pixel, cut off at the borders.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from flatwise.lab.augment.keys import below

# The numbers of the draws. Each decision keeps its own, whatever else is switched on.
MIRROR, ROW, COLUMN, CUTOUT_ROW, CUTOUT_COLUMN = range(5)


def mirror_and_crop(images: Tensor, keys: Tensor, *, flips: bool, padding: int) -> Tensor:
    """Shift each image by up to ``padding`` pixels, then mirror it with probability 1/2.

    Args:
        images: uint8, (batch, channels, height, width).
        keys: int64, (batch,), on the CPU.
        flips: mirror left and right at all.
        padding: black pixels that are put around before the old size is cropped at random.

    Returns:
        New images of the same shape.
    """
    batch, channels, height, width = images.shape
    left = torch.arange(width).expand(batch, width)
    if flips:
        left = torch.where((below(keys, MIRROR, 2) == 1)[:, None], left.flip(1), left)
    rows = torch.arange(height) + below(keys, ROW, 2 * padding + 1)[:, None]
    columns = left + below(keys, COLUMN, 2 * padding + 1)[:, None]
    pixels = (rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]).flatten(1)
    pixels = pixels.to(images.device, non_blocking=True)
    padded = functional.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, pixels[:, None].expand(batch, channels, height * width)).view(images.shape)


def cutout(images: Tensor, keys: Tensor, side: int) -> Tensor:
    """Set a square of each image to zero.

    Each image has a place of its own, as in the paper of DeVries and Taylor; the SAM authors' code takes one place for
    the whole batch.

    Args:
        images: normalised images, (batch, channels, height, width), changed in place: zero is the mean colour.
        keys: int64, (batch,), on the CPU.
        side: of the square, in pixels; what reaches over the border is cut off, so the area varies.

    Returns:
        The images.
    """
    height, width = images.shape[-2:]
    inside = [
        _near(below(keys, draw, size), size, side) for draw, size in ((CUTOUT_ROW, height), (CUTOUT_COLUMN, width))
    ]
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill_(mask.to(images.device, non_blocking=True), 0)


def _near(centres: Tensor, size: int, side: int) -> Tensor:
    # from centre - side // 2 on, side pixels
    offset = torch.arange(size) - (centres[:, None] - side // 2)
    return (offset >= 0) & (offset < side)
