"""Which part of a photograph a network sees: a box drawn from a key, or the centre.

The random crop is that of the Inception networks (Szegedy et al. 2015, section 6): a part of 8 to 100 % of the area
with an aspect ratio from 3/4 to 4/3. A draw is a hash of the image's key and the draw's number (SplitMix64, Steele,
Lea, Flood 2014), so it is the same on any machine and in any process.
"""

from __future__ import annotations

import math

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
# The side of the middle of a resized image, of its shorter side: 224 of 256 pixels.
CENTRE = 224 / 256
# The augmentations that follow draw from the same key, with small numbers.
FIRST_DRAW = 1 << 32
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def draw_bits(key: int, number: int) -> int:
    """Draw 64 bits: the output of a SplitMix64 that began at the key, after ``number`` others.

    Args:
        key: any whole number, taken modulo 2^64.
        number: which draw, from 0.

    Returns:
        A number in [0, 2^64).
    """
    state = (key + (number + 1) * GOLDEN) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def uniform(key: int, number: int) -> float:
    """Draw a number in [0, 1).

    Args:
        key: the image's key.
        number: which draw, from 0.

    Returns:
        A multiple of 2^-53.
    """
    return (draw_bits(key, number) >> 11) * 2.0**-53


def inception_box(width: int, height: int, key: int) -> tuple[int, int, int, int]:
    """Draw a box of random area, aspect ratio and place.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        key: decides the box.

    Returns:
        Left, top, width and height; the largest allowed box in the centre where ten draws do not fit, as in
        torchvision.
    """
    for attempt in range(ATTEMPTS):
        area, ratio, across, down = (uniform(key, FIRST_DRAW + 4 * attempt + number) for number in range(4))
        pixels = width * height * (AREA[0] + (AREA[1] - AREA[0]) * area)
        shape = math.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratio)
        wide, high = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < wide <= width and 0 < high <= height:
            return int(across * (width - wide + 1)), int(down * (height - high + 1)), wide, high
    shape = min(max(width / height, RATIO[0]), RATIO[1])
    wide, high = min(width, round(height * shape)), min(height, round(width / shape))
    return (width - wide) // 2, (height - high) // 2, wide, high


def shorter_side(resolution: int) -> int:
    """Say how long the shorter side of an image is when its centre is cut out.

    Args:
        resolution: side of the centre, in pixels.

    Returns:
        Pixels: 256 for 224.
    """
    return round(resolution / CENTRE)
