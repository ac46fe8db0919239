"""One file to one image: decoded, made RGB, cropped and resized; and one clear error where it is broken.

With a key, the crop is that of ``augment.inception``, whose box depends on the key and the image's size alone: so it is
the same on any machine and in any process.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flatwise.errors import UserError
from flatwise.lab.augment.inception import crop_boxes

# What Pillow raises on a broken file: its decoders differ.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error, Image.DecompressionBombError)
# The side of the middle of a resized image, of its shorter side: 224 of 256 pixels.
CENTRE = 224 / 256
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")


def decode(path: Path, resolution: int, key: int | None) -> Tensor:
    """Read an image.

    Args:
        path: the file, in any format that Pillow reads.
        resolution: side of the square that is returned, in pixels.
        key: decides the random crop; None takes the centre.

    Returns:
        uint8, (3, resolution, resolution).

    Raises:
        UserError: the file is missing, cut off, or no image.
    """
    try:
        with Image.open(path) as file:
            image = as_rgb(file)
    except BROKEN as error:
        reason = "it is empty" if path.is_file() and not path.stat().st_size else _without(path, error)
        raise UserError(f"broken image {path}: {reason}; replace the file or take it out of the data set") from error
    from torchvision.transforms import functional

    side = [resolution, resolution]
    if key is None:
        image = functional.center_crop(functional.resize(image, [round(resolution / CENTRE)]), side)
    else:
        box = crop_boxes(torch.tensor([key]), image.height, image.width)[:, 0].tolist()
        image = functional.resized_crop(image, *box, side)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_rgb(image: Image.Image) -> Image.Image:
    """Give an image three channels.

    Args:
        image: gray, with a palette, CMYK, with an opacity, of 8 or 16 bits.

    Returns:
        The whole image, decoded; where it had an opacity, its colours without it.
    """
    if image.mode in SIXTEEN_BITS:
        # Pillow would cut off what is above 255 instead of scaling it
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 257
        image = Image.fromarray(levels.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _without(path: Path, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(f" {str(path)!r}", "")
