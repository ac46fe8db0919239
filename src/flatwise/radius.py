"""A radius that sets itself: ``rho="auto"`` (docs/frugal.md has the reasons and the record).

What a radius does to a step can be seen in the step. Let g be the gradient of a batch at w, g' that of the same batch
at w + eps, l and l' the losses, v the base's momentum. Four numbers:

    turn  = <g, g'> / (||g|| ||g'||)        1 where the perturbation changes nothing
    slope = (l' - l) / (1 - turn)           how much the loss rises for the gradient to turn, in nats
    rise  = (l' - l) / l                    0 where the perturbation changes nothing
    drag  = <g, v> / (||g|| ||v||)          positive where one step after the other goes the same way

A *look* measures them. The radius is moved until the turn, the slope or the rise is what is aimed at, whichever comes
first; where steps still go the same way, there is nothing yet to protect the network from, and the radius makes way:

    q   = min(arccos(turn*) / arccos(turn), slope / slope*, rise* / rise, drag* / drag where drag > drag*)
    rho <- max(rho_0 / 8, rho clip(q^k, 1/2, 2))

with the drag averaged over looks. The slope falls as 1 / rho: the loss rises with rho, and ``1 - turn`` with its
square. So it is a radius too, of that length at which the rise is worth the turn.

The radius rises fast and falls slowly, but for the drag (k is ``up``, ``down`` or ``slow``): a network that learns
wrong labels by heart bends its loss more and more, and a radius that gave way would let it.

A method with two passes has both gradients, and a look costs it some norms. A method with one pass makes both in a
step that looks, one in 32. Where it climbs along the momentum it looks along the gradient, and goes ``stretch`` times
as far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from flatwise.directions import momentum_of, real
from flatwise.nograd import no_grad
from flatwise.norms import joint_norm
from flatwise.shards import Sharding, local, shardings_of

STEPS, LOOKS, DRAG = "sam_auto_steps", "sam_auto_looks", "sam_auto_drag"
"""Entries of the first group: perturbed steps and looks so far, and the running mean of the drag."""

TINY = 1e-3
"""An angle below which rounding is measured."""
START = 0.05
"""First radius along the gradient, where nothing else is said."""
FIRST = 12
"""Looks at the start of a training, on every second step: there the radius finds its order of magnitude."""
FIRST_SHARE = 0.015
"""Share of a short training that these may take where a look costs a gradient."""
STRIDE, SMALL = 8, 8192
"""Of tensors with more than ``SMALL`` numbers each eighth one is looked at: a look holds an eighth of a copy."""
LEAST = 1 / 8
"""The radius does not fall below this share of the first one: from there it is soon back."""


@dataclass(frozen=True)
class AutoRadius:
    """How the radius sets itself.

    Attributes:
        turn: cosine between the gradients at w and at w + eps that is aimed at, 0 < turn < 1.
        slope: rise of the loss, in its own unit (nats), over ``1 - turn``, that is aimed at where it comes first, >= 0.
            0 leaves it out, as where flatwise does not see the losses, or the look is not along the gradient.
        rise: relative rise of the loss that is aimed at where it comes first, > 0. Where a framework runs the passes,
            flatwise does not see the losses, and this is left out.
        drag: cosine between the gradient at w and the base's momentum above which the radius falls, > 0. Left out
            where the base has no momentum.
        start: first radius along the gradient; None: 0.05, or the default of a method that is made by its name.
        every: steps from look to look, after the first ones; None: 4 with two passes, 32 with one.
        up: exponent where the radius rises, 0 < up <= 1; None: 0.2 with two passes, 1 with one.
        down: exponent where turn, slope or rise let it fall, 0 <= down <= 1.
        slow: exponent where the drag lets it fall, 0 <= slow <= 1.
        memory: decay of the average of the drag over looks, 0 <= memory < 1.
    """

    turn: float = 0.93
    slope: float = 4.5
    rise: float = 0.35
    drag: float = 0.05
    start: float | None = None
    every: int | None = None
    up: float | None = None
    down: float = 0.05
    slow: float = 0.5
    memory: float = 0.75

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if one is out of its range.
        """
        wrong = {
            f"turn is a cosine and must be in (0, 1), got {self.turn!r}": not 0 < self.turn < 1,
            f"slope must be >= 0, got {self.slope!r}": not self.slope >= 0,
            f"rise must be > 0, got {self.rise!r}": not self.rise > 0,
            f"drag must be > 0, got {self.drag!r}": not self.drag > 0,
            f"start must be a finite number > 0, got {self.start!r}": (
                self.start is not None and not (math.isfinite(self.start) and self.start > 0)
            ),
            f"every must be a whole number >= 2, got {self.every!r}": (
                self.every is not None and not (isinstance(self.every, int) and self.every >= 2)
            ),
            f"up must be in (0, 1], got {self.up!r}": self.up is not None and not 0 < self.up <= 1,
            f"down must be in [0, 1], got {self.down!r}": not 0 <= self.down <= 1,
            f"slow must be in [0, 1], got {self.slow!r}": not 0 <= self.slow <= 1,
            f"memory must be in [0, 1), got {self.memory!r}": not 0 <= self.memory < 1,
        }
        for text, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(text)

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

    def smoothed(self, known: float | None, drag: float) -> float | None:
        """Average the drag over looks.

        Args:
            known: the average so far; None before the first look. It begins at 0, so that one look alone says little.
            drag: of this look; NaN where it has none.

        Returns:
            The new average.
        """
        if math.isnan(drag):
            return known
        return self.memory * (known or 0.0) + (1 - self.memory) * drag

    def next(self, radius: float, seen: Seen, *, first: float, settled: bool, one_pass: bool) -> float:
        """Return the radius after a look.

        Args:
            radius: of the group, until now.
            seen: what the look has shown.
            first: the radius that the training began with.
            settled: whether the first looks are over.
            one_pass: whether looks are rare.

        Returns:
            From half to twice the radius; the radius itself where the turn is not a number.
        """
        if math.isnan(seen.turn):
            return radius
        angle = max(math.acos(max(-1.0, min(1.0, seen.turn))), TINY)
        quotient = math.acos(self.turn) / angle
        if self.slope > 0 and not math.isnan(seen.nats):
            quotient = min(quotient, max(seen.nats, 0.0) / (self.slope * (1 - math.cos(angle))))
        if seen.rise > 0:
            quotient = min(quotient, self.rise / seen.rise)
        dragged = seen.drag is not None and seen.drag > self.drag
        if seen.drag is not None and dragged:
            quotient = min(quotient, self.drag / seen.drag)
        power = 1.0
        if settled:
            up = self.up if self.up is not None else 1.0 if one_pass else 0.2
            power = up if quotient > 1 else self.slow if dragged else self.down
        return max(LEAST * first, radius * min(2.0, max(0.5, math.pow(quotient, power))))


@dataclass(frozen=True)
class Seen:
    """What a look has shown.

    Attributes:
        turn: cosine between both gradients; NaN where it is not known.
        rise: relative rise of the loss; NaN where it is not known.
        drag: average cosine between the gradient at w and the momentum; None where it is not known.
        nats: rise of the loss itself; NaN where it is not known, or not along the gradient.
    """

    turn: float
    rise: float
    drag: float | None
    nats: float = math.nan


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
        TypeError: if it is another word.
    """
    if isinstance(rho, AutoRadius):
        return rho
    if not isinstance(rho, str):
        return None
    if rho != "auto":
        raise TypeError(f"rho must be a number, a function of the step or 'auto', got {rho!r}")
    return AutoRadius()


class Gauge:
    """The gradients of a step that looks, at w and at w + eps, and the cosine between them.

    Where the batch is cut into micro-batches, each has its own; the mean counts.
    """

    def __init__(self) -> None:
        self._first: list[tuple[Tensor, Tensor]] = []
        self._cosines: list[Tensor] = []
        self._drags: list[Tensor] = []

    @no_grad
    def before(self, params: Sequence[Tensor], base: Optimizer) -> None:
        """Keep the gradients at w.

        Args:
            params: with gradients in ``.grad``.
            base: whose momentum they are compared with.
        """
        self._first = [(p, _sample(p, p.grad, keep=True)) for p in params if p.grad is not None]
        found = [(p, first, momentum_of(base.state.get(p) or {})) for p, first in self._first]
        pairs = [(p, first, v) for p, first, v in found if v is not None and v.shape == p.shape]
        if pairs:
            over = shardings_of(p for p, _, _ in pairs)
            self._drags.append(_cosine([g for _, g, _ in pairs], [_sample(p, v) for p, _, v in pairs], over))

    @no_grad
    def after(self) -> None:
        """Compare them with the gradients that are in ``.grad`` now."""
        pairs = [(p, first, _sample(p, p.grad)) for p, first in self._first if p.grad is not None]
        self._first = []
        if not pairs:
            return
        over = shardings_of(p for p, _, _ in pairs)
        first, second = [a for _, a, _ in pairs], [b for _, _, b in pairs]
        self._cosines.append(_cosine(first, second, over))

    def turn(self) -> float:
        """Return the cosine; NaN where nothing was compared. Waits for the device."""
        return _mean(self._cosines)

    def drag(self) -> float:
        """Return the cosine between the gradient at w and the momentum; NaN where there is none."""
        return _mean(self._drags)


def _mean(cosines: Sequence[Tensor]) -> float:
    return math.fsum(map(float, cosines)) / len(cosines) if cosines else math.nan


def _sample(param: Tensor, grad: Tensor, *, keep: bool = False) -> Tensor:
    """Return those numbers of a gradient that are looked at, as heavy as all of them; a copy where it is kept."""
    flat = real(local(grad, param)).reshape(-1)
    if flat.numel() > SMALL:
        return flat[::STRIDE] * math.sqrt(STRIDE)
    return flat.clone() if keep else flat


def _cosine(first: Sequence[Tensor], second: Sequence[Tensor], over: Sequence[Sharding | None]) -> Tensor:
    """Return the cosine from three norms, which are those of all processes where tensors are cut.

    From unit vectors, so that gradients of very different lengths do not lose it: ``1 - ||a - b||^2 / 2``.
    """
    a, b = (joint_norm(vectors, over=over) for vectors in (first, second))
    apart = [v / a.to(v.device) - w / b.to(v.device) for v, w in zip(first, second, strict=True)]
    return 1 - joint_norm(apart, over=over).square() / 2
