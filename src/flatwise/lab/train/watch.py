"""Notices that the loss is no number any more, and says what to change."""

from __future__ import annotations

import torch
from torch import Tensor

from flatwise.errors import TrainingError

SKIPS = 30
"""Steps in a row without a finite loss that a scaler may need: from its first scale, 65536, to 1 it takes 16."""


class Watch:
    """Looks at the losses of a training.

    Args:
        scaled: whether a scaler is at work. It skips steps whose loss or gradient overflows in float16, and lowers
            its scale; that alone is no reason to stop.
    """

    def __init__(self, scaled: bool) -> None:
        self._scaled = scaled
        self._skipped = 0

    def look(self, losses: Tensor, rates: list[float], first: int, rho: float, *, updated: bool) -> None:
        """Stop a training that cannot recover.

        Args:
            losses: of the steps since the last look, in order.
            rates: the learning rate of each of them.
            first: the number of the first of them, counted from 0.
            rho: the radius.
            updated: whether the last of them had a finite gradient to step with.

        Raises:
            TrainingError: a loss, or the last gradient, is infinite or NaN.
        """
        finite = torch.isfinite(losses).tolist()
        place = None
        if self._scaled:
            for number, good in enumerate(finite):
                self._skipped = 0 if good else self._skipped + 1
                if self._skipped >= SKIPS:
                    place = number
                    break
        elif not all(finite):
            place = finite.index(False)
        elif not updated:
            place = len(finite) - 1
        if place is None:
            return
        what = f"the loss is {float(losses[place])}" if not finite[place] else "the gradient is not finite"
        more = ", or use --precision bf16" if self._scaled else ""
        raise TrainingError(
            f"{what} in step {first + place + 1}, with learning rate {rates[place]:g} and rho {rho:g}: "
            f"lower --lr or --rho, lengthen --warmup, or clip the gradient with --clip 1{more}"
        )
