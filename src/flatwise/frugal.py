"""A preset near the base optimizer's price, with nothing to tune (docs/frugal.md says what it reaches)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from flatwise.ascent import GradientAscent
from flatwise.directions import Momentum
from flatwise.optimizer import SAM
from flatwise.radius import Radius
from flatwise.schedule import Schedule


class Frugal(SAM):
    """Momentum-SAM (Becker, Altrock, Risse, arXiv 2401.12033) with a radius that sets itself.

    One gradient a step, but for one step in 32, which looks at what the radius does and costs two. The first of these
    come on every second step, at most 1.5 % of the training where ``total_steps`` is given.
    ``flatwise.create("frugal", base)`` is the same.

    Args:
        base_optimizer: SGD with momentum, one of the Adam family, or a list of such.
        total_steps: planned length of the training.
        rho: ``"auto"``, or an :class:`flatwise.AutoRadius` with other settings.
        **options: further ones of :class:`flatwise.SAM`, which raises a ValueError if the base has no momentum.
    """

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *,
        total_steps: int | None = None,
        rho: Radius = "auto",
        **options: Any,
    ) -> None:
        super().__init__(
            base_optimizer,
            rho=rho,
            ascent=GradientAscent(direction=Momentum()),
            schedule=Schedule(total_steps=total_steps),
            **options,
        )
