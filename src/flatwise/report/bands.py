"""What a chart shows: lines, each with a band around it, on one pair of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# Okabe and Ito's colours, which stay apart for colour-blind readers; black is kept for text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Band:
    """A line with a band around it.

    Attributes:
        label: what it is called.
        positions: horizontal places.
        means: the line's heights.
        half_widths: how far the band reaches above and below.
    """

    label: str
    positions: Sequence[float]
    means: Sequence[float]
    half_widths: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what is shown.
        unit: what the heights are in.
        bands: what is drawn.
        limits: lowest and highest value that can occur; a band is cut there.
        from_zero: begin the vertical axis at 0.
    """

    title: str
    unit: str
    bands: Sequence[Band] = field(default_factory=tuple)
    limits: tuple[float, float] | None = None
    from_zero: bool = False
