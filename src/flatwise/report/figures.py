"""Figures: lines with bands, drawn so that they can be read without colour and at the size of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flatwise.report.bands import COLOURS, Band, Panel

__all__ = ["COLOURS", "DASHES", "FAINT", "INK", "Band", "Panel", "draw_panels"]

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1)), (0, (8, 2)))
INK, FAINT = "#222222", "#777777"


def draw_panels(panels: Sequence[Panel], file: BinaryIO, *, title: str, subtitle: str, horizontal: str) -> None:
    """Draw panels side by side, with one legend, as a PNG.

    Nothing global is touched: no pyplot, no backend, no style of the caller's is changed or used up.

    Args:
        panels: at least one; a label has the same colour and dash in each.
        file: open for writing bytes.
        title: above everything.
        subtitle: below the title, such as what the bands are.
        horizontal: name of the horizontal axis.
    """
    figure = Figure(figsize=(4.8 * len(panels), 3.9), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel, handles)
        axes.set_xlabel(horizontal, color=INK)
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.text(0.012, 0.905, subtitle, fontsize=9, color=FAINT)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
    )
    figure.savefig(file, format="png")


def _draw_panel(axes: Any, panel: Panel, handles: dict[str, Any]) -> None:
    for band in panel.bands:
        number = list(handles).index(band.label) if band.label in handles else len(handles)
        colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        low = [mean - half for mean, half in zip(band.means, band.half_widths, strict=True)]
        high = [mean + half for mean, half in zip(band.means, band.half_widths, strict=True)]
        if panel.limits is not None:
            low = [max(panel.limits[0], value) for value in low]
            high = [min(panel.limits[1], value) for value in high]
        axes.fill_between(band.positions, low, high, color=colour, alpha=0.18, linewidth=0)
        # One point makes no line.
        marker = "o" if len(band.positions) == 1 else None
        (line,) = axes.plot(band.positions, band.means, color=colour, linestyle=dashes, linewidth=1.8, marker=marker)
        handles.setdefault(band.label, line)
    axes.set_title(panel.title, loc="left", fontsize=10.5, color=INK)
    axes.set_ylabel(panel.unit, color=INK)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.limits is not None and axes.get_ylim()[1] > panel.limits[1]:
        axes.set_ylim(top=panel.limits[1])
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # no half epochs
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.tick_params(colors=FAINT)
