"""Perturbations of half-precision weights, which rounding can swallow.

``w + eps`` is rounded to the grid of the weights, and an ``eps`` of less than half a step of that grid is gone. What
arrives, ``<moved, eps> / ||eps||^2``, is 1 where rounding does no harm. Rounding up or down at random, with
probabilities that make the mean right (stochastic rounding), lets all of it arrive in the mean, at the price of noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
ENOUGH = 0.9
"""Share of the perturbation below which a warning is given."""

# Bits of the significand, and the exponent of the finest grid (bfloat16 has finer ones, whose inverse is no float32).
_GRID = {torch.bfloat16: (8, -120), torch.float16: (11, -24)}


def round_at_random(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round to one of the two nearest numbers of a coarser dtype, in the mean exactly.

    Args:
        exact: float32, any shape.
        dtype: float16 or bfloat16.
        generator: on the device of ``exact``.

    Returns:
        Shape of ``exact``, in ``dtype``.
    """
    digits, finest = _GRID[dtype]
    step = (torch.frexp(exact).exponent - digits).clamp(min=finest)
    steps = torch.ldexp(exact, -step)
    below = steps.trunc()
    up = torch.rand(exact.shape, generator=generator, device=exact.device) < (steps - below).abs()
    return torch.ldexp(below + torch.copysign(up.to(exact.dtype), exact), step).to(dtype)


class Arrival:
    """How much of a perturbation arrives, summed over tensors."""

    def __init__(self) -> None:
        self._along: list[Tensor] = []
        self._whole: list[Tensor] = []

    def add(self, before: Sequence[Tensor], after: Sequence[Tensor], intended: Sequence[Tensor]) -> None:
        """Take in some tensors.

        Args:
            before: the weights at w.
            after: the weights as they are.
            intended: eps in float32 or better.
        """
        for old, new, eps in zip(before, after, intended, strict=True):
            moved = new.to(eps.dtype) - old.to(eps.dtype)
            self._along.append((moved * eps).sum().cpu().double())
            self._whole.append((eps * eps).sum().cpu().double())

    def share(self) -> float:
        """Return ``<moved, eps> / ||eps||^2``; 1 where there is nothing."""
        whole = float(sum(self._whole, torch.zeros(())))
        return float(sum(self._along, torch.zeros(()))) / whole if whole > 0 else 1.0


def warn_if_swallowed(share: float, dtypes: Collection[torch.dtype]) -> None:
    """Warn if too little of a perturbation arrives.

    Args:
        share: from :meth:`Arrival.share`.
        dtypes: of the weights.
    """
    if share < ENOUGH:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        warnings.warn(
            f"only {100 * share:.0f} % of the perturbation arrives: weights in {names} are too coarse for this radius. "
            "Keep the weights in float32 and use torch.autocast, give a larger rho, or "
            "flatwise.create(name, base, rounding='stochastic'), with which all of it arrives in the mean",
            stacklevel=2,
        )
