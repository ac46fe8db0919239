"""Which values of a landscape are drawn, on which scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flatwise.errors import UserError
from flatwise.measure.landscape_result import EVALUATED, UNKNOWN, Landscape
from flatwise.measure.refine import guessed
from flatwise.report.scales import needs_log


@dataclass(frozen=True)
class Heights:
    """What is drawn of the values, for all models alike.

    Attributes:
        values: shape of the landscape's, clipped; NaN where there is nothing to be drawn.
        low: the smallest.
        high: the largest.
        log: whether the scale is logarithmic.
        cut: how many points were cut off above.
        gaps: how many were not finite.
        predicted: how many were not known yet, and are drawn as predicted.
    """

    values: Any
    low: float
    high: float
    log: bool
    cut: int
    gaps: int
    predicted: int

    @property
    def norm(self) -> Any:
        """The scale of matplotlib's colours."""
        from matplotlib.colors import LogNorm, Normalize

        return (LogNorm if self.log else Normalize)(self.low, self.high if self.high > self.low else self.low + 1e-12)


def heights_of(landscape: Landscape, log: bool | None, clip: float | None) -> Heights:
    """Decide what is drawn.

    Args:
        landscape: complete or not.
        log: None: where values are positive and differ much.
        clip: the largest value that is drawn.

    Returns:
        The values and their scale.

    Raises:
        UserError: if there is nothing to be drawn, or it has no logarithm.
    """
    values = landscape.values.clone()
    unknown = landscape.states == UNKNOWN
    if landscape.dimensions == 2 and bool(unknown.any()):
        values = torch.stack([guessed(v, s == EVALUATED) for v, s in zip(values, landscape.states, strict=True)])
    there = torch.isfinite(values)
    gaps = int((~there & ~unknown).sum())
    predicted = int((there & unknown).sum())
    values[~there] = torch.nan
    if not bool(there.any()):
        raise UserError("there is nothing to draw: no point has a finite value")
    cut = 0 if clip is None else int((values > clip).sum())
    if clip is not None:
        values = values.clamp_max(clip)
    low, high = float(values[there].min()), float(values[there].max())
    if log and low <= 0:
        raise UserError(f"log=True needs values above zero, the smallest is {low:.3g}")
    return Heights(values.numpy(), low, high, needs_log(low, high) if log is None else log, cut, gaps, predicted)
