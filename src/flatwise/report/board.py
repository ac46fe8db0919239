"""The two pictures of the board: accuracy against cost, and accuracy against the radius."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flatwise.report.bands import COLOURS
from flatwise.report.figures import DASHES, FAINT, INK

LABEL_HEIGHT = 0.026
"""Of a panel's height: how far apart two labels must be that stand one above the other."""
MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Dot:
    """A method in the picture of costs.

    Attributes:
        label: its name.
        cost: relative to the base.
        accuracy: in percent.
        half_width: of its interval.
        front: whether it is on the Pareto front.
    """

    label: str
    cost: float
    accuracy: float
    half_width: float
    front: bool


@dataclass(frozen=True)
class Curve:
    """A method on one task in the picture of radii.

    Attributes:
        task: the task's title.
        radii: rising.
        gains: accuracy minus the base's, in points.
        half_widths: of the intervals.
        chosen: which radius validation chose.
    """

    task: str
    radii: Sequence[float]
    gains: Sequence[float]
    half_widths: Sequence[float]
    chosen: int


def draw_costs(panels: Sequence[tuple[str, Sequence[Dot]]], file: BinaryIO, *, subtitle: str) -> None:
    """Draw accuracy against cost, a panel for each task.

    Args:
        panels: title and methods of each task.
        file: open for writing bytes; takes a PNG.
        subtitle: what the bars are.
    """
    figure = _figure(8.6, 6.0 * len(panels))
    for axes, (title, dots) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        ordered = sorted((dot for dot in dots if dot.front), key=lambda dot: dot.cost)
        axes.step(
            [dot.cost for dot in ordered],
            [dot.accuracy for dot in ordered],
            where="post",
            color=COLOURS[0],
            linewidth=1.2,
            alpha=0.6,
            label="Pareto front",
        )
        for dot in dots:
            colour = COLOURS[0] if dot.front else "#999999"
            style = {"fmt": "o", "markersize": 6 if dot.front else 4, "color": colour, "ecolor": "#dddddd"}
            axes.errorbar(dot.cost, dot.accuracy, yerr=dot.half_width, elinewidth=0.8, zorder=3 + dot.front, **style)
        axes.set_xscale("log")
        low, high = min(dot.cost for dot in dots), max(dot.cost for dot in dots)
        ticks = [tick for tick in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if low * 0.95 <= tick <= high * 1.05]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(low * 0.95, high * 1.35)
        _label(axes, dots)
        _tidy(axes, title)
        axes.set_xlabel("time of a training / SGD's", color=INK)
        axes.set_ylabel("test accuracy, %", color=INK)
        axes.legend(frameon=False, loc="lower right", fontsize=8.5)
    _title(figure, "Accuracy against cost", subtitle)
    figure.savefig(file, format="png")


def _label(axes: Any, dots: Sequence[Dot]) -> None:
    """Write every name beside its dot, in the nearest place that no dot and no other name has."""
    axes.figure.draw_without_rendering()
    inverse = axes.transAxes.inverted()
    places = {dot: inverse.transform(axes.transData.transform((dot.cost, dot.accuracy))) for dot in dots}
    taken = [(x - 0.006, x + 0.006, y) for x, y in places.values()]
    for dot in sorted(dots, key=lambda dot: (not dot.front, -dot.accuracy)):
        x, y = places[dot]
        y += LABEL_HEIGHT * 0.8 * dot.front  # beside its dot the name would lie on the line of the front
        width = 0.0115 * len(dot.label) + 0.005
        choices = [
            (abs(step) + (2 if side < 0 else 0), side, y + step * LABEL_HEIGHT / 2)
            for step in range(-40, 41)
            for side in (1, -1)
        ]
        left, height, side = x + 0.012, y, 1
        for _, side, height in sorted(choices):
            left = x + 0.012 if side > 0 else x - 0.012 - width
            if left >= 0 and 0.01 < height < 0.99 and _free(left, left + width, height, taken):
                break
        taken.append((left, left + width, height))
        moved = abs(height - y) >= LABEL_HEIGHT
        line = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "relpos": (0 if side > 0 else 1, 0.5)}
        axes.annotate(
            dot.label,
            (dot.cost, dot.accuracy),
            (left if side > 0 else left + width, height),
            textcoords="axes fraction",
            fontsize=7.5,
            va="center",
            ha="left" if side > 0 else "right",
            color=COLOURS[0] if dot.front else INK,
            fontweight="bold" if dot.front else "normal",
            arrowprops={**line, "shrinkA": 0, "shrinkB": 2} if moved else None,
            zorder=5,
        )


def _free(left: float, right: float, height: float, taken: Sequence[tuple[float, float, float]]) -> bool:
    return all(abs(height - other) >= LABEL_HEIGHT * 0.8 or right < start or left > end for start, end, other in taken)


def draw_radii(panels: Sequence[tuple[str, Sequence[Curve]]], file: BinaryIO, *, subtitle: str) -> None:
    """Draw accuracy against the radius, a small panel for each method.

    Args:
        panels: name and curves of each method; a task has the same colour in each.
        file: open for writing bytes; takes a PNG.
        subtitle: what the bands are.
    """
    columns = min(5, len(panels))
    count = math.ceil(len(panels) / columns)
    figure = _figure(max(8.0, 2.35 * columns), 1.9 * count + 1.2)
    grid = figure.subplots(count, columns, squeeze=False, sharey=True)
    tasks = list(dict.fromkeys(curve.task for _, curves in panels for curve in curves))
    handles: dict[str, Any] = {}
    for axes, (name, curves) in zip(grid.flat, panels, strict=False):
        axes.axhline(0, color=INK, linewidth=0.8)
        for curve in curves:
            number = tasks.index(curve.task)
            line = {"color": COLOURS[number], "linestyle": DASHES[number], "linewidth": 1.5}
            bars = {"marker": MARKERS[number], "markersize": 3.5, "elinewidth": 0.9}
            handles[curve.task] = axes.errorbar(curve.radii, curve.gains, yerr=curve.half_widths, **line, **bars)
            axes.plot(
                curve.radii[curve.chosen], curve.gains[curve.chosen], "o", color=COLOURS[number], ms=9, mfc="none"
            )
        axes.set_xscale("log")
        ticks = sorted({radius for curve in curves for radius in curve.radii})
        # Names of radii that lie close to each other would run together.
        ticks = [tick for number, tick in enumerate(ticks) if number == 0 or tick > 1.6 * ticks[number - 1]]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.12)
        _tidy(axes, name)
        axes.tick_params(labelsize=7.5)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    # Not one label for the whole figure: the legend would lie on it.
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("rho", fontsize=9, color=INK)
    figure.supylabel("test accuracy minus SGD's, points", fontsize=9.5, color=INK)
    _title(figure, "Accuracy against the radius", subtitle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, format="png")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Figure, title: str, subtitle: str) -> None:
    figure.suptitle(f"{title}: {subtitle}", x=0.012, ha="left", fontsize=10.5, color=INK)


def _tidy(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.tick_params(colors=FAINT)
