"""The operations of AutoAugment and RandAugment: their strengths, and torchvision's kernels that do them.

An operation with its strength is one value, so the images of a batch that share it go through one call. Names,
strengths and results are those of ``torchvision.transforms.AutoAugment``: black where nothing was, nearest neighbour.
The ranges are those of Cubuk et al. (2019, arXiv 1805.09501); where the authors' code deviates from them,
docs/augmentation.md says so.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flatwise.errors import UserError

SHEARS = ("ShearX", "ShearY")
SHIFTS = ("TranslateX", "TranslateY")
# Each with torchvision's name for it.
ENHANCEMENTS = {
    "Brightness": "adjust_brightness",
    "Color": "adjust_saturation",
    "Contrast": "adjust_contrast",
    "Sharpness": "adjust_sharpness",
}
# These go either way, with a sign that is drawn.
SIGNED = frozenset((*SHEARS, *SHIFTS, "Rotate", *ENHANCEMENTS))
LARGEST_SHIFT = 150 / 331  # of the side: Cubuk et al. moved images of 331 pixels by up to 150


class Operation(NamedTuple):
    """One operation with its strength.

    Attributes:
        name: of the operation.
        strength: slope, pixels, degrees, what is added to the factor 1, bits that are kept, or threshold.
    """

    name: str
    strength: float


@lru_cache(maxsize=4096)
def operation(name: str, level: int | None, levels: int, height: int, width: int, negative: bool) -> Operation:
    """Translate a level into what the operation takes.

    Args:
        name: of the operation.
        level: from 0 up to ``levels - 1``; None where the operation has no strength.
        levels: how many levels there are, evenly spaced over the range.
        height: of the images, in pixels.
        width: of the images, in pixels.
        negative: take the strength's negative, where the operation has a sign.

    Returns:
        The operation.
    """
    if level is None:
        return Operation(name, 0.0)
    if name == "Posterize":
        return Operation(name, 8 - round(level / ((levels - 1) / 4)))
    # in float32, as torchvision: a threshold or a shift may turn over at a whole number
    strength = float(torch.linspace(*_range(name, height, width), levels)[level])
    return Operation(name, -strength if negative and name in SIGNED else strength)


def _range(name: str, height: int, width: int) -> tuple[float, float]:
    if name in SHEARS:
        return 0.0, 0.3
    if name in SHIFTS:
        return 0.0, LARGEST_SHIFT * (width if name == "TranslateX" else height)
    if name == "Rotate":
        return 0.0, 30.0
    return (255.0, 0.0) if name == "Solarize" else (0.0, 0.9)


def perform(images: Tensor, one: Operation) -> Tensor:
    """Do one operation to all the images.

    Args:
        images: uint8, (batch, 1 or 3 channels, height, width); they stay as they are.
        one: the operation.

    Returns:
        uint8, the same shape.

    Raises:
        UserError: torchvision is not installed.
    """
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise UserError("AutoAugment and RandAugment come from torchvision: pip install 'flatwise[lab]'") from error
    name, strength = one
    if name in SHEARS:
        # the slope is the tangent of torchvision's angle, about the corner of the image
        angles = [0.0, 0.0]
        angles[SHEARS.index(name)] = math.degrees(math.atan(strength))
        result = functional.affine(images, 0.0, [0, 0], 1.0, angles, center=[0, 0])
    elif name in SHIFTS:
        pixels = [0, 0]
        pixels[SHIFTS.index(name)] = int(strength)
        result = functional.affine(images, 0.0, pixels, 1.0, [0.0, 0.0])
    elif name in ENHANCEMENTS:
        result = getattr(functional, ENHANCEMENTS[name])(images, 1.0 + strength)
    elif name == "Posterize":
        result = functional.posterize(images, int(strength))
    elif name in ("Rotate", "Solarize"):
        result = getattr(functional, name.lower())(images, strength)
    else:
        result = getattr(functional, name.lower())(images)
    assert isinstance(result, Tensor)
    return result
