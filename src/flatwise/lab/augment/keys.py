"""Random numbers that are functions of a key and a number, not the next of a stream.

Each image of each epoch has a key of 64 bits; its j-th draw is a hash of (key, j). So an image's augmentation is the
same in any batch, any process and after any resume, and one augmentation more does not move the draws of the others.
The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014) in int64 arithmetic, which wraps alike on every
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatwise.seeds import derive

# The 64-bit constants of SplitMix64, as signed numbers.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)


def scramble(values: Tensor) -> Tensor:
    """Hash each 64-bit number; a bijection.

    Args:
        values: int64, any shape.

    Returns:
        int64, the same shape.
    """
    for shift, factor in ((30, FIRST), (27, SECOND)):
        values = (values ^ _shifted(values, shift)) * factor
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, count: int) -> Tensor:
    # torch shifts a signed number arithmetically; the mask takes the copies of the sign away again
    return (values >> count) & ((1 << (64 - count)) - 1)


def sample_keys(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Make the key of each image of one epoch.

    Args:
        seed: the run's seed.
        epoch: which pass over the data.
        indices: int64, (batch,): each image's place in the data set.

    Returns:
        int64, (batch,), on the device of the indices.
    """
    start = derive(seed, "augmentation", epoch)
    # the inner hash keeps apart epochs whose starts differ by a multiple of the step
    return scramble(scramble(indices.to(torch.int64) * GOLDEN) ^ start)


def bits(keys: Tensor, draws: Tensor) -> Tensor:
    """Draw 64 bits for each key and each draw number.

    Args:
        keys: int64, (batch,).
        draws: int64, (draws,): the numbers of the draws.

    Returns:
        int64, (draws, batch).
    """
    return scramble(keys + (draws[:, None] + 1) * GOLDEN)


def uniform(keys: Tensor, *draws: int) -> Tensor:
    """Draw numbers in [0, 1), in steps of 2^-53.

    Args:
        keys: int64, (batch,).
        *draws: the numbers of the draws.

    Returns:
        float64, (draws, batch).
    """
    return _shifted(bits(keys, torch.tensor(draws, device=keys.device)), 11).to(torch.float64) * 2.0**-53


def below(keys: Tensor, draw: int, bound: int | Tensor) -> Tensor:
    """Draw a whole number from 0 up to, not including, a bound.

    Args:
        keys: int64, (batch,).
        draw: the number of the draw.
        bound: at most 2^31, one for all or one for each key; the chances differ by less than bound / 2^32.

    Returns:
        int64, (batch,).
    """
    high = _shifted(bits(keys, torch.tensor([draw], device=keys.device))[0], 32)
    return (high * bound) >> 32
