"""Figures of loss landscapes: lines, contours, and surfaces side by side with one scale and one camera.

What a picture cannot show stands under it: the samples, the statistics of batch normalisation, the seed, how many
points were measured, and that it is a cut through a space of many more dimensions.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from mpl_toolkits.mplot3d import Axes3D

from flatwise.errors import UserError
from flatwise.measure.landscape_result import EVALUATED, UNKNOWN, Landscape, Style
from flatwise.measure.refine import guessed
from flatwise.measure.result import digits
from flatwise.report.figures import COLOURS, DASHES, FAINT, INK

COLOUR_MAP = "viridis"
CAMERA = {"elev": 27.0, "azim": -57.0}
WIDE = 100.0
"""The factor between the largest and the smallest value from which a logarithmic scale is taken."""


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
        """The scale of the colours."""
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
    wide = low > 0 and high > WIDE * low
    return Heights(values.numpy(), low, high, wide if log is None else log, cut, gaps, predicted)


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
    words = textwrap.wrap(" · ".join(_facts(landscape, heights)), int(width * 16))
    words += textwrap.wrap(_limits(landscape), int(width * 16))
    bottom, top = 0.12 + 0.17 * len(words), 0.02 if title is None else 0.3
    sheet = _Sheet(width, bottom + 3.75 + top, bottom, panels, beside)
    figure = Figure(figsize=(sheet.width, sheet.height), dpi=dpi)
    FigureCanvasAgg(figure)
    figure.text(0.2 / width, (bottom - 0.02) / sheet.height, "\n".join(words), fontsize=8, color=FAINT, va="top")
    if title is not None:
        figure.text(0.2 / width, 1 - 0.15 / sheet.height, title, fontsize=12, fontweight="bold", color=INK, va="top")
    if style == "line":
        _lines(figure.add_axes(sheet.flat(0)), landscape, heights)
    else:
        _planes(figure, landscape, heights, sheet, style == "surface")
    if landscape.track is not None:
        _track(
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


def _lines(axes: Any, landscape: Landscape, heights: Heights) -> None:
    for number, name in enumerate(landscape.names):
        colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        places, values = np.array(landscape.axes[0]), heights.values[number]
        known = (landscape.states[number] != UNKNOWN).numpy()
        errors = landscape.standard_errors[number].numpy()
        if np.isfinite(errors[known]).any():
            low, high = values - errors, values + errors
            low = np.maximum(low, heights.low / 2) if heights.log else low
            axes.fill_between(places[known], low[known], high[known], color=colour, alpha=0.18, linewidth=0)
        axes.plot(places[known], values[known], color=colour, linestyle=dashes, linewidth=1.8, label=name)
    for mark in landscape.marks:
        axes.plot(mark.coordinates[0], mark.loss, "o", color=INK, markersize=5, zorder=5)
        axes.annotate(
            mark.name,
            (mark.coordinates[0], mark.loss),
            xytext=(5, 6),
            textcoords="offset points",
            fontsize=9,
            color=INK,
        )
    if heights.log:
        axes.set_yscale("log")
    _tidy(axes)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_xlabel(landscape.labels[0], color=INK)
    axes.set_ylabel("loss", color=INK)
    if len(landscape.names) > 1 or not landscape.marks:
        axes.legend(frameon=False, fontsize=9)


def _planes(figure: Figure, landscape: Landscape, heights: Heights, sheet: _Sheet, solid: bool) -> None:
    x, y = (np.array(axis) for axis in landscape.axes)
    columns = len(landscape.names)
    for number, name in enumerate(landscape.names):
        if solid:
            axes = Axes3D(figure, sheet.solid(number), computed_zorder=False)
            figure.add_axes(axes)
            _surface(axes, x, y, heights.values[number], heights)
        else:
            axes = figure.add_axes(sheet.flat(number))
            _contour(axes, x, y, heights.values[number], heights)
            _places(axes, landscape)
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


def _surface(axes: Any, x: Any, y: Any, values: Any, heights: Heights) -> None:
    z = np.log10(values) if heights.log else values
    low, high = (np.log10(heights.low), np.log10(heights.high)) if heights.log else (heights.low, heights.high)
    colours = ScalarMappable(heights.norm, COLOUR_MAP).to_rgba(np.nan_to_num(values, nan=heights.high))
    colours[~np.isfinite(values)] = 0.0
    axes.plot_surface(
        *np.meshgrid(x, y, indexing="ij"),
        z,
        facecolors=colours,
        rcount=len(x),
        ccount=len(y),
        linewidth=0.15,
        edgecolor=(0, 0, 0, 0.25),
        antialiased=True,
        shade=False,
    )
    axes.set_zlim(low, high if high > low else low + 1e-12)
    axes.view_init(**CAMERA)
    axes.set_box_aspect((1, 1, 0.72), zoom=0.93)
    if heights.log:
        axes.zaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.zaxis.set_major_formatter(FuncFormatter(lambda power, _: f"$10^{{{power:.0f}}}$"))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set_facecolor("white")
        axis.pane.set_edgecolor("#cccccc")
        axis._axinfo["grid"]["color"] = "#e3e3e3"
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(colors=FAINT, labelsize=7, pad=-1)
    axes.xaxis.labelpad = axes.yaxis.labelpad = -3


def _contour(axes: Any, x: Any, y: Any, values: Any, heights: Heights) -> None:
    ends = (heights.low, heights.high if heights.high > heights.low else heights.low + 1e-12)
    levels = (np.geomspace if heights.log else np.linspace)(*ends, 25)
    shown = np.ma.masked_invalid(values).T
    axes.set_facecolor("#d9d9d9")
    axes.contourf(x, y, shown, levels=levels, norm=heights.norm, cmap=COLOUR_MAP, extend="neither")
    lines = axes.contour(x, y, shown, levels=levels[2::4], norm=heights.norm, colors="white", linewidths=0.7, alpha=0.8)
    axes.clabel(lines, fontsize=7, fmt=lambda level: f"{level:.2g}")
    _tidy(axes)


def _places(axes: Any, landscape: Landscape) -> None:
    """Draw what has a name, the way of a training run, or else the centre."""
    if landscape.track is not None:
        way = np.array(landscape.track.coordinates)
        axes.plot(way[:, 0], way[:, 1], color="white", linewidth=2.6)
        axes.plot(way[:, 0], way[:, 1], color="#D55E00", linewidth=1.3, marker="o", markersize=2.6)
        for text, row in (("start", way[0]), ("end", way[-1])):
            _name(axes, text, row)
    elif landscape.marks:
        for mark in landscape.marks:
            axes.plot(*mark.coordinates, "o", color="#D55E00", markeredgecolor="white", markersize=6, zorder=5)
            _name(axes, f"{mark.name}: {digits(mark.loss, None)}", mark.coordinates)
    else:
        axes.plot(0, 0, "+", color="white", markersize=8, markeredgewidth=1.4)


def _name(axes: Any, text: str, place: Sequence[float]) -> None:
    low, high = axes.get_xlim()
    left = place[0] < (low + high) / 2
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    axes.annotate(
        text,
        tuple(place),
        xytext=(6 if left else -6, 7),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        ha="left" if left else "right",
        bbox=box,
        zorder=6,
    )


def _track(axes: Any, landscape: Landscape) -> None:
    track = landscape.track
    assert track is not None
    for label, row, number in (
        ("true: the recorded weights", track.losses, 0),
        ("projected on the plane", track.projected, 1),
    ):
        axes.plot(track.steps, row, color=COLOURS[number], linestyle=DASHES[number], linewidth=1.6, label=label)
    values = [value for value in (*track.losses, *track.projected) if np.isfinite(value)]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    _tidy(axes)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_xlabel("training step", color=INK, fontsize=9)
    axes.set_title("loss along the run", loc="left", fontsize=10.5, color=INK)
    axes.legend(frameon=False, fontsize=8)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.tick_params(colors=FAINT, labelsize=8)
    axes.set_axisbelow(True)


def _facts(landscape: Landscape, heights: Heights) -> list[str]:
    """Say in a few words each under which conditions the picture holds."""
    total, evaluated = landscape.values.numel(), landscape.evaluations
    c = landscape.conditions
    facts = [f"{c.samples:,} samples", f"mode {c.mode}"]
    statistics = {
        "none": "no batch normalisation",
        "recompute": "batch norm: statistics recomputed at every point",
        "frozen": "batch norm: frozen running statistics, which fit other weights badly",
        "batch": "batch norm: statistics of each batch",
    }
    facts.append(statistics[landscape.batch_norm])
    kinds = list(dict.fromkeys(landscape.directions))
    facts.append("directions: " + ", ".join(kinds) + (", orthogonal" if landscape.orthogonalize else ""))
    if any(kind.startswith("random") for kind in kinds):
        facts.append(f"seed {landscape.seed}")
    if not landscape.complete:
        rest = f", {heights.predicted} predicted" if heights.predicted else ""
        facts.append(f"INCOMPLETE: {evaluated} of {total} points measured{rest}")
    elif evaluated < total:
        errors = [error for error in landscape.error_seen if error is not None]
        facts.append(
            f"{evaluated} of {total} points measured, the rest predicted"
            + (f" (checks: within {100 * max(errors):.1f} % of the range)" if errors else "")
        )
    if heights.cut:
        facts.append(f"cut above {heights.high:.3g} ({heights.cut} points)")
    if heights.gaps:
        facts.append(f"{heights.gaps} points without a finite loss left out")
    if landscape.dimensions == 1 and bool(torch.isfinite(landscape.standard_errors).any()):
        facts.append("bands: one standard error of the samples")
    return facts + [_number(key, value) for key, value in landscape.annotate.items()]


def _number(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{key}: " + ", ".join(f"{name} {_short(entry)}" for name, entry in value.items())
    return f"{key}: {_short(value)}"


def _short(value: Any) -> str:
    return digits(float(value), None) if isinstance(value, int | float) else str(value)


def _limits(landscape: Landscape) -> str:
    """Say what the picture cannot show."""
    weights = f"{landscape.conditions.weights:,}"
    cut = f"A {landscape.dimensions}-D cut through {weights} dimensions"
    if all(kind.startswith("random") for kind in landscape.directions):
        return f"{cut}, drawn at random: it hardly meets the few directions in which the loss bends most."
    if landscape.track is not None:
        shares = sum(landscape.explained)
        return f"{cut}, with {100 * shares:.1f} % of the variance of the recorded weights; the run leaves the plane."
    return f"{cut}: what lies beside it is not seen."
