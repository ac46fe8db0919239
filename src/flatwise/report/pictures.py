"""Figures of loss landscapes: lines, contours, and surfaces side by side with one scale and one camera.

What a picture cannot show stands under it: the samples, the statistics of batch normalisation, the seed, how many
points were measured, and that it is a cut through a space of many more dimensions.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D

from flatwise.errors import UserError
from flatwise.measure.landscape_result import Landscape, Style
from flatwise.report.captions import facts_of, limits_of
from flatwise.report.figures import FAINT, INK
from flatwise.report.heights import Heights, heights_of
from flatwise.report.panels import COLOUR_MAP, draw_contour, draw_lines, draw_places, draw_surface, draw_track


def draw(
    landscape: Landscape,
    path: str | Path | None = None,
    style: Style | None = None,
    *,
    log: bool | None = None,
    clip: float | None = None,
    title: str | None = None,
    dpi: int = 150,
) -> Figure:
    """Draw a landscape, and write the figure where a path is given.

    Args:
        landscape: complete or not.
        path: of a file whose ending says what it is to be.
        style: None: a line, or surfaces.
        log: a logarithmic scale; None: where it is needed.
        clip: the largest value that is drawn.
        title: above everything.
        dpi: pixels of an inch.

    Returns:
        The figure. Nothing global is touched, no pyplot.

    Raises:
        UserError: if the style does not fit the landscape.
    """
    fitting = ("line",) if landscape.dimensions == 1 else ("surface", "contour")
    style = style or fitting[0]  # type: ignore[assignment]
    if style not in fitting:
        kind = "line" if landscape.dimensions == 1 else "plane"
        raise UserError(f"a {kind} is drawn with style={' or '.join(map(repr, fitting))}, got {style!r}")
    heights = heights_of(landscape, log, clip)
    columns = len(landscape.names) if landscape.dimensions == 2 else 1
    panels = columns + (landscape.track is not None)
    beside = 0.25 if landscape.dimensions == 1 else 1.0 + 0.15 * (landscape.track is not None)
    width = max(6.4, 4.4 * panels + beside)
    words = textwrap.wrap(" · ".join(facts_of(landscape, heights)), int(width * 16))
    words += textwrap.wrap(limits_of(landscape), int(width * 16))
    bottom, top = 0.12 + 0.17 * len(words), 0.02 if title is None else 0.3
    sheet = _Sheet(width, bottom + 3.75 + top, bottom, panels, beside)
    figure = Figure(figsize=(sheet.width, sheet.height), dpi=dpi)
    FigureCanvasAgg(figure)
    figure.text(0.2 / width, (bottom - 0.02) / sheet.height, "\n".join(words), fontsize=8, color=FAINT, va="top")
    if title is not None:
        figure.text(0.2 / width, 1 - 0.15 / sheet.height, title, fontsize=12, fontweight="bold", color=INK, va="top")
    if style == "line":
        draw_lines(figure.add_axes(sheet.flat(0)), landscape, heights)
    else:
        _planes(figure, landscape, heights, sheet, style == "surface")
    if landscape.track is not None:
        draw_track(
            figure.add_axes(
                sheet.flat(panels - 1, beside - 0.25 if columns < panels and landscape.dimensions == 2 else 0.0)
            ),
            landscape,
        )
    if path is not None:
        figure.savefig(Path(path))
    return figure


@dataclass(frozen=True)
class _Sheet:
    """Where things stand on the page, in inches."""

    width: float
    height: float
    bottom: float
    panels: int
    beside: float

    def _share(self, left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
        return (left / self.width, bottom / self.height, width / self.width, height / self.height)

    @property
    def step(self) -> float:
        return (self.width - self.beside) / self.panels

    def flat(self, number: int, shift: float = 0.0) -> tuple[float, float, float, float]:
        """A panel with axes on its edges."""
        return self._share(0.75 + self.step * number + shift, self.bottom + 0.55, self.step - 0.85, 2.9)

    def solid(self, number: int) -> tuple[float, float, float, float]:
        """A panel for three dimensions, whose axes leave a margin of their own."""
        return self._share(0.05 + self.step * number, self.bottom + 0.16, self.step, 3.65)

    def bar(self, after: int, *, solid: bool) -> tuple[float, float, float, float]:
        """A narrow panel for colours to the right of so many panels."""
        left = self.step * after + (0.15 if solid else 0.02)
        return self._share(left, self.bottom + 0.75, 0.13, 2.5)


def _planes(figure: Figure, landscape: Landscape, heights: Heights, sheet: _Sheet, solid: bool) -> None:
    x, y = (np.array(axis) for axis in landscape.axes)
    columns = len(landscape.names)
    for number, name in enumerate(landscape.names):
        if solid:
            axes = Axes3D(figure, sheet.solid(number), computed_zorder=False)
            figure.add_axes(axes)
            draw_surface(axes, x, y, heights.values[number], heights)
        else:
            axes = figure.add_axes(sheet.flat(number))
            draw_contour(axes, x, y, heights.values[number], heights)
            draw_places(axes, landscape)
        axes.set_xlabel(landscape.labels[0], color=INK, fontsize=7.5 if solid else 9)
        if number == 0 or solid:
            axes.set_ylabel(landscape.labels[1], color=INK, fontsize=7.5 if solid else 9)
        text = name if columns > 1 or name != "model" else ""
        if solid:
            figure.text(*_above(sheet, number), text, fontsize=11, fontweight="bold", color=INK, ha="center", va="top")
        else:
            axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK)
    shown = figure.add_axes(sheet.bar(columns, solid=solid))
    bar = figure.colorbar(ScalarMappable(heights.norm, COLOUR_MAP), cax=shown)
    bar.set_label("loss (logarithmic)" if heights.log else "loss", color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=FAINT)
    bar.outline.set_visible(False)


def _above(sheet: _Sheet, number: int) -> tuple[float, float]:
    x, y, width, height = sheet.solid(number)
    return (x + width / 2, y + 0.96 * height)
