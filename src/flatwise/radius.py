"""A radius that sets itself: ``rho="auto"``.

What a radius does to a step can be seen in the step. Let g be the gradient of a batch at w and g' that of the same
batch at w + eps, l and l' the losses. Two numbers without a unit say how far away w + eps is:

    turn = <g, g'> / (||g|| ||g'||)         1 where the perturbation changes nothing
    rise = (l' - l) / l                     0 likewise

The radius is moved until the turn is ``AutoRadius.turn``, or the rise is ``AutoRadius.rise``, whichever comes first:

    q   = min(arccos(AutoRadius.turn) / arccos(turn), AutoRadius.rise / rise)
    rho <- rho * clip(q^k, 1/2, 2)

The angle limits where labels are noisy, since losses are large there; the rise limits where the loss is small and there
is little to protect. The radius rises fast and falls slowly (k = ``up``, ``down``): a network that learns wrong labels by
heart bends its loss more and more, and a radius that gave way would let it.

A method with two passes has both gradients; a *look* costs it three norms. A method with one pass makes both passes in a
step that looks, which is one step in ``every``; where it climbs along the momentum it looks along the gradient, and moves
``stretch`` times as far as what it finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatwise.directions import real
from flatwise.norms import joint_norm
from flatwise.shards import Sharding, local, shardings_of

STEPS, LOOKS = "sam_auto_steps", "sam_auto_looks"
"""Entries of the first group: perturbed steps, and looks, so far."""

START = 0.05
"""First radius along the gradient, where nothing else is said."""
FIRST = 12
"""Looks at the start of a training, on every second step: there the radius finds its order of magnitude."""
FIRST_SHARE = 0.015
"""Share of a short training that these may take where a look costs a gradient."""
STRIDE, SMALL = 8, 8192
"""Of tensors with more than ``SMALL`` numbers every eighth one is looked at, so that a look holds an eighth of a copy."""


@dataclass(frozen=True)
class AutoRadius:
    """How the radius sets itself.

    Attributes:
        turn: cosine between the gradients at w and at w + eps that is aimed at, 0 < turn < 1.
        rise: relative rise of the loss that is not exceeded, > 0. Where a framework runs the passes, flatwise does not
            see the losses, and the turn alone decides.
        start: first radius along the gradient; None: 0.05, or the default of a method that is made by its name.
        every: steps from look to look, after the first ones; None: 4 with two passes, 32 with one.
        up: exponent k where the radius rises, 0 < up <= 1.
        down: exponent k where it falls, 0 <= down <= 1.
    """

    turn: float = 0.94
    rise: float = 0.3
    start: float | None = None
    every: int | None = None
    up: float | None = None
    down: float = 0.1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if one is out of its range.
        """
        if not 0 < self.turn < 1:
            raise ValueError(f"turn is a cosine and must be in (0, 1), got {self.turn!r}")
        if not self.rise > 0:
            raise ValueError(f"rise must be > 0, got {self.rise!r}")
        if self.start is not None and not (math.isfinite(self.start) and self.start > 0):
            raise ValueError(f"start must be a finite number > 0, got {self.start!r}")
        if self.every is not None and not (isinstance(self.every, int) and self.every >= 2):
            raise ValueError(f"every must be a whole number >= 2, got {self.every!r}")
        if self.up is not None and not 0 < self.up <= 1:
            raise ValueError(f"up must be in (0, 1], got {self.up!r}")
        if not 0 <= self.down <= 1:
            raise ValueError(f"down must be in [0, 1], got {self.down!r}")

    def first(self, stretch: float) -> float:
        """Return the radius that a training begins with.

        Args:
            stretch: of the method's direction.

        Returns:
            The radius of the method.
        """
        return stretch * (START if self.start is None else self.start)

    def looks(self, steps: int, seen: int, *, one_pass: bool, total_steps: int | None) -> bool:
        """Tell whether a perturbed step looks.

        Args:
            steps: perturbed steps before it.
            seen: looks before it.
            one_pass: whether a look costs a gradient.
            total_steps: of the training, where known.

        Returns:
            True where it does.
        """
        if seen < first_looks(one_pass=one_pass, total_steps=total_steps):
            return steps % 2 == 1
        return steps % (self.every or (32 if one_pass else 4)) == 0

    def factor(self, turn: float, rise: float, *, seen: int, one_pass: bool, total_steps: int | None) -> float:
        """Return what the radius is multiplied by.

        Args:
            turn: cosine between the two gradients of a look.
            rise: relative rise of the loss; NaN where it is not known.
            seen: looks before this one.
            one_pass: whether looks are rare.
            total_steps: of the training, where known.

        Returns:
            A number from 1/2 to 2; 1 where the turn is not a number.
        """
        if math.isnan(turn):
            return 1.0
        quotient = math.acos(self.turn) / max(math.acos(max(-1.0, min(1.0, turn))), 1e-3)
        if rise > 0:
            quotient = min(quotient, self.rise / rise)
        power = 1.0
        if seen >= first_looks(one_pass=one_pass, total_steps=total_steps):
            up = self.up if self.up is not None else 1.0 if one_pass else 0.2
            power = up if quotient > 1 else self.down
        return float(min(2.0, max(0.5, quotient**power)))


Radius = float | str | AutoRadius | Callable[[int], float]
"""A radius: a number, ``"auto"`` with or without settings, or a function of the step (0, 1, 2, ...)."""


def first_looks(*, one_pass: bool, total_steps: int | None) -> int:
    """Return how many looks a training begins with.

    Args:
        one_pass: whether a look costs a gradient.
        total_steps: of the training, where known.

    Returns:
        12; fewer in a short training where they cost something, at least 1.
    """
    if not one_pass or total_steps is None:
        return FIRST
    return max(1, min(FIRST, round(FIRST_SHARE * total_steps)))


def as_auto(rho: Any) -> AutoRadius | None:
    """Read ``rho``: ``"auto"`` and an :class:`AutoRadius` are one, all else is None.

    Args:
        rho: what the user gave.

    Returns:
        The settings, or None.

    Raises:
        ValueError: if it is another word.
    """
    if isinstance(rho, AutoRadius):
        return rho
    if not isinstance(rho, str):
        return None
    if rho != "auto":
        raise ValueError(f"rho must be a number, a function of the step or 'auto', got {rho!r}")
    return AutoRadius()


class Gauge:
    """The gradients of a step that looks, at w and at w + eps, and the cosine between them.

    Where the batch is cut into micro-batches, each has its own; the mean counts.
    """

    def __init__(self) -> None:
        self._first: list[tuple[Tensor, Tensor]] = []
        self._cosines: list[Tensor] = []

    @torch.no_grad()
    def before(self, params: Sequence[Tensor]) -> None:
        """Keep the gradients at w.

        Args:
            params: with gradients in ``.grad``.
        """
        self._first = [(p, _sample(p)) for p in params if p.grad is not None]

    @torch.no_grad()
    def after(self) -> None:
        """Compare them with the gradients that are in ``.grad`` now."""
        pairs = [(p, first, _sample(p)) for p, first in self._first if p.grad is not None]
        self._first = []
        if not pairs:
            return
        over = shardings_of(p for p, _, _ in pairs)
        first, second = [a for _, a, _ in pairs], [b for _, _, b in pairs]
        self._cosines.append(_cosine(first, second, over))

    def turn(self) -> float:
        """Return the cosine; NaN where nothing was compared. Waits for the device."""
        if not self._cosines:
            return math.nan
        return math.fsum(float(cosine) for cosine in self._cosines) / len(self._cosines)


def _sample(param: Tensor) -> Tensor:
    """Return a copy of those numbers of a parameter's gradient that are looked at, as heavy as all of them."""
    assert param.grad is not None
    flat = real(local(param.grad, param)).reshape(-1)
    return flat[::STRIDE] * math.sqrt(STRIDE) if flat.numel() > SMALL else flat.clone()


def _cosine(first: Sequence[Tensor], second: Sequence[Tensor], over: Sequence[Sharding | None]) -> Tensor:
    """Return the cosine from three norms, which are those of all processes where tensors are cut.

    From unit vectors, so that gradients of very different lengths do not lose it: ``1 - ||a - b||^2 / 2``.
    """
    a, b = (joint_norm(vectors, over=over) for vectors in (first, second))
    apart = [v / a.to(v.device) - w / b.to(v.device) for v, w in zip(first, second, strict=True)]
    return 1 - joint_norm(apart, over=over).square() / 2
