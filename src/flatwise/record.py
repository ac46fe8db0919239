"""What a step did, read when somebody asks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Reason = Literal[
    "perturbed",
    "schedule",
    "zero radius",
    "zero gradient",
    "non-finite gradient",
    "non-finite update",
    "no gradient",
    "no direction",
]
"""Why a step was a SAM step or not; see :attr:`StepRecord.reason`."""


def _number(value: Tensor | float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass
class StepRecord:
    """The record of one step (of its last micro-batch, where there are several, for the norms).

    Nothing here is copied from a device until it is read: reading an attribute is what waits.

    Attributes:
        step: index of the step, from 0.
        rho: largest radius of the parameter groups in this step.
        passes: gradients computed in this step, in units of the whole batch (2 for SAM, 1 where inactive).
        closure_calls: how often the closure or the loss function ran.
    """

    step: int = 0
    rho: float = 0.0
    passes: float = 0.0
    closure_calls: int = 0
    _loss: Tensor | float | None = field(default=None, repr=False)
    _perturbed_loss: Tensor | float | None = field(default=None, repr=False)
    _norm: Tensor | None = field(default=None, repr=False)
    _gradient_norm: Tensor | None = field(default=None, repr=False)
    _update_norm: Tensor | None = field(default=None, repr=False)
    _turn: float = field(default=math.nan, repr=False)
    _drag: float = field(default=math.nan, repr=False)
    _radius: Callable[[], float] | None = field(default=None, repr=False)
    _finite: Tensor | bool | None = field(default=None, repr=False)
    _reason: Reason = field(default="perturbed", repr=False)

    @property
    def loss(self) -> float:
        """The loss at w: the loss to log. NaN where flatwise did not see it (two calls, ``perturbed()``)."""
        return _number(self._loss)

    @property
    def perturbed_loss(self) -> float:
        """The loss at w + eps; NaN where there was no second pass or flatwise did not see it."""
        return _number(self._perturbed_loss)

    @property
    def sharpness(self) -> float:
        """``perturbed_loss - loss``."""
        return self.perturbed_loss - self.loss

    @property
    def gradient_norm(self) -> float:
        """Norm of the first gradient over what is perturbed: ``||Tg||_q`` (SAM: the L2 norm).

        The L2 norm where a method climbs along an average; NaN where there was no first pass.
        """
        return _number(self._gradient_norm)

    @property
    def turn(self) -> float:
        """Cosine between the gradients at w and at w + eps; NaN but in steps by which ``rho="auto"`` is set."""
        return self._turn

    @property
    def drag(self) -> float:
        """Cosine between the gradient at w and the base's momentum; NaN but in steps by which ``rho="auto"`` is set."""
        return self._drag

    @property
    def update_norm(self) -> float:
        """L2 norm of the last gradient before it was clipped; NaN without ``max_grad_norm``."""
        return _number(self._update_norm)

    @property
    def perturbation_norm(self) -> float:
        """Norm ``||T^-1 eps||_p`` of the perturbation that was made; 0 where there was none.

        Measured on the moved weights where they are float16 or bfloat16, whose rounding can swallow a perturbation.
        """
        return 0.0 if self._radius is None or self.reason != "perturbed" else self._radius()

    @property
    def reason(self) -> Reason:
        """Why the step was what it was.

        ``"perturbed"``: a SAM step. ``"schedule"``: the schedule was not active. ``"zero radius"``: every rho is 0.
        ``"no gradient"``: no perturbed parameter had one. ``"no direction"``: a method without a first pass has nothing
        to climb along yet, as before the first update. ``"zero gradient"``: there is no direction to climb.
        ``"non-finite gradient"``: the first gradient held infinity or NaN, nothing was perturbed.
        ``"non-finite update"``: the last gradient held infinity or NaN, nothing was updated.
        """
        if self._finite is not None and not bool(self._finite):
            return "non-finite update"
        if self._reason == "perturbed" and self._norm is not None:
            norm = float(self._norm)
            if norm == 0:
                return "zero gradient"
            if not math.isfinite(norm):
                return "non-finite gradient"
        return self._reason

    @property
    def active(self) -> bool:
        """Whether the weights were perturbed and the update made."""
        return self.reason == "perturbed"

    @property
    def updated(self) -> bool:
        """Whether the base optimizer was given a finite gradient."""
        return self._finite is None or bool(self._finite)

    def asdict(self) -> dict[str, float | int | bool | str]:
        """Return every number as plain Python, for a logger. Waits for the device.

        Returns:
            The attributes and properties by name.
        """
        names = ("step", "loss", "perturbed_loss", "sharpness", "gradient_norm", "perturbation_norm", "rho", "active")
        return {name: getattr(self, name) for name in (*names, "reason", "updated", "passes", "closure_calls")}
