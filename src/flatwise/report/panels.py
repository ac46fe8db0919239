"""The panels of a figure of a landscape: lines, surface, contours, a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flatwise.measure.landscape_result import UNKNOWN, Landscape
from flatwise.measure.result import digits
from flatwise.report.bands import COLOURS
from flatwise.report.figures import DASHES, FAINT, INK
from flatwise.report.heights import Heights

COLOUR_MAP = "viridis"
CAMERA = {"elev": 27.0, "azim": -57.0}


def draw_lines(axes: Any, landscape: Landscape, heights: Heights) -> None:
    """Draw a line for each model, with a band of one standard error where there is one."""
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


def draw_surface(axes: Any, x: Any, y: Any, values: Any, heights: Heights) -> None:
    """Draw the surface of one model."""
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


def draw_contour(axes: Any, x: Any, y: Any, values: Any, heights: Heights) -> None:
    """Draw the contours of one model; what has no value is grey."""
    ends = (heights.low, heights.high if heights.high > heights.low else heights.low + 1e-12)
    levels = (np.geomspace if heights.log else np.linspace)(*ends, 25)
    shown = np.ma.masked_invalid(values).T
    axes.set_facecolor("#d9d9d9")
    axes.contourf(x, y, shown, levels=levels, norm=heights.norm, cmap=COLOUR_MAP, extend="neither")
    lines = axes.contour(x, y, shown, levels=levels[2::4], norm=heights.norm, colors="white", linewidths=0.7, alpha=0.8)
    axes.clabel(lines, fontsize=7, fmt=lambda level: f"{level:.2g}")
    _tidy(axes)


def draw_places(axes: Any, landscape: Landscape) -> None:
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


def draw_track(axes: Any, landscape: Landscape) -> None:
    """Draw the true losses of a training run beside the projected ones."""
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
