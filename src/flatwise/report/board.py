"""The two pictures of the board: accuracy against cost, and accuracy against the radius."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flatwise.report.figures import COLOURS, DASHES, FAINT, INK

LABEL_HEIGHT = 0.037
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
            style = {"fmt": "o", "markersize": 6 if dot.front else 4, "color": colour, "ecolor": "#cccccc"}
            axes.errorbar(dot.cost, dot.accuracy, yerr=dot.half_width, elinewidth=1, zorder=3 + dot.front, **style)
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
    """Write every name to the right of its dot, moved up or down to the nearest free place."""
    axes.figure.draw_without_rendering()
    inverse = axes.transAxes.inverted()
    places = {dot: inverse.transform(axes.transData.transform((dot.cost, dot.accuracy))) for dot in dots}
    taken: list[tuple[float, float, float]] = []
    for dot in sorted(dots, key=lambda dot: (not dot.front, -dot.accuracy)):
        x, y = places[dot]
        left, width = x + 0.012, 0.0125 * len(dot.label) + 0.01

        def free(height: float, left: float = left, width: float = width) -> bool:
            return all(
                abs(height - other) >= LABEL_HEIGHT or left + width < start or left > end for start, end, other in taken
            )

        offsets = sorted((step * LABEL_HEIGHT / 3 for step in range(-60, 61)), key=abs)
        height = next((y + offset for offset in offsets if 0.02 < y + offset < 0.98 and free(y + offset)), y)
        taken.append((left, left + width, height))
        moved = abs(height - y) > LABEL_HEIGHT
        axes.annotate(
            dot.label,
            (dot.cost, dot.accuracy),
            (left, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            color=COLOURS[0] if dot.front else INK,
            fontweight="bold" if dot.front else "normal",
            arrowprops={"arrowstyle": "-", "color": "#c8c8c8", "linewidth": 0.6} if moved else None,
            zorder=5,
        )


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
    figure.supxlabel("rho (each method has a scale of its own)", fontsize=9.5, color=INK)
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
