"""Crops of random size and shape, resized to the full size (Szegedy et al. 2014), over a whole batch at once.

The box is drawn as in ``torchvision.transforms.RandomResizedCrop``: an area of 8 to 100 %, a ratio of the sides from
3:4 to 4:3, up to ten tries, then the largest middle part of such a ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from flatwise.lab.augment.keys import below, uniform

# The numbers of the draws; policy.py has those below 32.
BOX_ROW, BOX_COLUMN = 32, 33
FIRST_TRY = 34  # area, ratio, of each try
TRIES = 10
SMALLEST_AREA = 0.08
NARROWEST, WIDEST = 3 / 4, 4 / 3


def crop_boxes(keys: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Draw a box for each image.

    Args:
        keys: int64, (batch,), on the CPU.
        height: of all images, or of each, in pixels.
        width: of all images, or of each, in pixels.

    Returns:
        int64, (4, batch): top, left, height and width of the boxes.
    """
    heights = torch.as_tensor(height).expand(keys.shape)
    widths = torch.as_tensor(width).expand(keys.shape)
    draws = uniform(keys, *range(FIRST_TRY, FIRST_TRY + 2 * TRIES))
    areas = (SMALLEST_AREA + (1 - SMALLEST_AREA) * draws[0::2]) * (heights * widths)
    ratios = torch.exp(math.log(NARROWEST) + (math.log(WIDEST) - math.log(NARROWEST)) * draws[1::2])
    box_widths, box_heights = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (box_widths >= 1) & (box_widths <= widths) & (box_heights >= 1) & (box_heights <= heights)
    first = fits.to(torch.int64).argmax(0, keepdim=True)
    found = fits.any(0)
    last_heights, last_widths = _middle(heights, widths)
    tall = torch.where(found, box_heights.gather(0, first)[0].to(torch.int64), last_heights)
    wide = torch.where(found, box_widths.gather(0, first)[0].to(torch.int64), last_widths)
    top = torch.where(found, below(keys, BOX_ROW, heights - tall + 1), (heights - tall) // 2)
    left = torch.where(found, below(keys, BOX_COLUMN, widths - wide + 1), (widths - wide) // 2)
    return torch.stack((top, left, tall, wide))


def _middle(heights: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    ratios = widths.to(torch.float64) / heights
    narrow, wide = ratios < NARROWEST, ratios > WIDEST
    cut_heights = torch.where(narrow, (widths / NARROWEST).round().to(torch.int64), heights)
    return cut_heights, torch.where(wide, (heights * WIDEST).round().to(torch.int64), widths)


def resize_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Cut a box out of each image and enlarge it to the size of the image, bilinearly.

    Args:
        images: uint8, (batch, channels, height, width).
        boxes: int64, (4, batch): top, left, height and width.

    Returns:
        uint8, the same shape.
    """
    height, width = images.shape[-2:]
    top, left, tall, wide = boxes.to(images.device, torch.float32, non_blocking=True)
    rows, columns = _places(top, tall, height), _places(left, wide, width)
    size = (len(images), height, width)
    grid = torch.stack((columns[:, None, :].expand(size), rows[:, :, None].expand(size)), dim=-1)
    enlarged = functional.grid_sample(
        images.to(torch.float32, memory_format=torch.contiguous_format),
        grid, mode="bilinear", padding_mode="border", align_corners=False,
    )  # fmt: skip
    return enlarged.round_().to(torch.uint8)


def _places(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where each new pixel's middle lies in the old image, never outside the box, on grid_sample's scale."""
    middles = torch.arange(size, device=start.device) + 0.5
    places = start[:, None] + middles * (length[:, None] / size) - 0.5
    places = torch.minimum(torch.maximum(places, start[:, None]), (start + length - 1)[:, None])
    return (2 * places + 1) / size - 1
