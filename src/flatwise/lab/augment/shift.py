"""The augmentation of ``flatwise compare``: mirror and shift float images; its numbers stay as they were."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def augment(images: Tensor, padding: int, flips: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ``padding`` pixels and mirror half of them.

    Args:
        images: (batch, channels, height, width).
        padding: largest shift in each direction; what enters at the border has the value of the border.
        flips: mirror left and right, each image with probability 1/2.
        generator: decides each image's shift and mirror.

    Returns:
        New images of the same shape.
    """
    batch, _, height, width = images.shape
    # Repeating the border is padding with background, whatever value the background has after standardising.
    padded = functional.pad(images, (padding,) * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator)
    moved = windows[torch.arange(batch), :, rows, columns]
    if not flips:
        return moved
    mirrored = torch.rand(batch, generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], moved.flip(-1), moved)
