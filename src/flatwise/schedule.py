"""When to look, and how far (the ``schedule`` slot).

A step that is not active is the base optimizer's own step: one gradient, no perturbation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Radius = float | Callable[[int], float]
"""A radius: a number, or a function of the step (0, 1, 2, ...) that returns one."""


@dataclass(frozen=True)
class Schedule:
    """Active every ``every``-th step inside a window of training, after the warm-up.

    Attributes:
        every: 1 is every step, k is steps 0, k, 2k, ... (periodic SAM; cost 1 + 1/k gradients a step).
        window: start and stop as fractions of ``total_steps``, 0 <= start < stop <= 1. ``(0.9, 1.0)`` is the last
            tenth (late-phase SAM; Zhou et al., ICLR 2025). A stop of 1.0 has no end.
        total_steps: planned number of steps; needed where ``window`` is not the whole of training.
        warmup_steps: steps at the start without perturbation. Adaptive optimizers want none during the warm-up of
            the learning rate (Zhao et al., ICML 2024).
    """

    every: int = 1
    window: tuple[float, float] = (0.0, 1.0)
    total_steps: int | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if one is out of its range, or ``total_steps`` is missing.
        """
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be a whole number >= 1, got {self.every!r}")
        try:
            start, stop = self.window
        except (TypeError, ValueError):
            raise ValueError(f"window must be a pair (start, stop) of fractions, got {self.window!r}") from None
        if not 0 <= start < stop <= 1:
            raise ValueError(f"window must satisfy 0 <= start < stop <= 1 (fractions of training), got {self.window!r}")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {self.total_steps!r}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps!r}")
        if (start, stop) != (0, 1) and self.total_steps is None:
            raise ValueError(
                f"window={self.window!r} is a fraction of training, so flatwise must know its length: "
                "pass total_steps=epochs * len(loader)"
            )

    def active(self, step: int) -> bool:
        """Tell whether step ``step`` (0, 1, 2, ...) looks around.

        Args:
            step: steps taken before this one.

        Returns:
            True where the step perturbs.
        """
        if step < self.warmup_steps or step % self.every:
            return False
        start, stop = self.window
        if (start, stop) == (0, 1) or self.total_steps is None:
            return True
        first, end = (round(share * self.total_steps, 6) for share in (start, stop))  # 0.55 * 100 is not 55
        return step >= first and (stop == 1 or step < end)
