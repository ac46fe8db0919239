"""The picture of a sweep: radius against validation accuracy, and radius against learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from flatwise.errors import UserError
from flatwise.files import write_atomically
from flatwise.lab.sweep.results import Row, finished

MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(rows: Sequence[Row], path: Path, *, title: str, subtitle: str) -> None:
    """Draw a sweep's trials.

    Left, the radius in each method's own scale; a line where a method has none. Right, colour is accuracy. Trials that
    were stopped are crosses on the right, and are not on the left: the last accuracy they had is no result.

    Args:
        rows: of all trials.
        path: the PNG file.
        title: above everything.
        subtitle: below the title.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from flatwise.report.figures import COLOURS, FAINT, INK
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'flatwise[lab]'") from error
    figure = Figure(figsize=(10.4, 4.3), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    methods = sorted({row.method for row in rows})
    styles = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(methods)}
    _accuracies(left, rows, styles)
    _plane(figure, right, rows, styles)
    radii = [row.rho for row in rows if row.rho is not None]
    for axes in (left, right):
        _scale(axes.xaxis, radii)
        axes.grid(color="#e3e3e3", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#aaaaaa")
        axes.tick_params(colors=FAINT, which="both")
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.text(0.012, 0.905, subtitle, fontsize=9, color=FAINT)
    handles = _legend(rows, styles)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    image = BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, lambda file: file.write(image.getvalue()))


def _accuracies(axes: Any, rows: Sequence[Row], styles: dict[str, tuple[str, str]]) -> None:
    ended = finished(rows)
    for name, (colour, marker) in styles.items():
        own = [row for row in ended if row.method == name]
        placed = [row for row in own if row.rho is not None]
        if placed:
            axes.errorbar(
                [row.rho for row in placed],
                [100 * (row.accuracy or 0.0) for row in placed],
                yerr=[100 * (row.ci95 or 0.0) for row in placed],
                color=colour, marker=marker, linestyle="none", markersize=6, elinewidth=1, alpha=0.9,
            )  # fmt: skip
        elif own:
            axes.axhline(100 * (own[0].accuracy or 0.0), color=colour, linewidth=1.4, linestyle=(0, (5, 1.5)))
    axes.set_title("Radius and accuracy", loc="left", fontsize=10.5)
    axes.set_xlabel("rho, in each method's own scale")
    axes.set_ylabel("validation accuracy, %")


def _plane(figure: Any, axes: Any, rows: Sequence[Row], styles: dict[str, tuple[str, str]]) -> None:
    placed = [row for row in rows if row.rho is not None]
    stopped = [row for row in placed if row.pruned]
    axes.scatter(
        [row.rho for row in stopped], [row.lr for row in stopped], marker="x", color="#999999", s=26, linewidths=1.2
    )
    ended = finished(placed)
    heights = [100 * (row.accuracy or 0.0) for row in ended]
    shown = None
    for name, (colour, marker) in styles.items():
        own = [row for row in ended if row.method == name]
        if own:
            shown = axes.scatter(
                [row.rho for row in own], [row.lr for row in own], c=[100 * (row.accuracy or 0.0) for row in own],
                marker=marker, s=48, cmap="viridis", vmin=min(heights), vmax=max(heights),
                edgecolors=colour, linewidths=1.1,
            )  # fmt: skip
    if shown is not None:
        figure.colorbar(shown, ax=axes, label="validation accuracy, %")
    _scale(axes.yaxis, [row.lr for row in placed])
    axes.set_title("Radius and learning rate", loc="left", fontsize=10.5)
    axes.set_xlabel("rho, in each method's own scale")
    axes.set_ylabel("learning rate")


def _scale(axis: Any, values: Sequence[float | None]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # A logarithm, where there is something to spread and nothing is 0.
    numbers = [value for value in values if value is not None]
    if len(set(numbers)) < 2 or min(numbers) <= 0:
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    # Alike on both panels, whichever trials they show.
    room = (max(numbers) / min(numbers)) ** 0.05
    axis.axes.set(**{f"{axis.axis_name}lim": (min(numbers) / room, max(numbers) * room)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(numbers) < 200 * min(numbers) else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(rows: Sequence[Row], styles: dict[str, tuple[str, str]]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    for name, (colour, marker) in styles.items():
        if any(row.rho is not None for row in rows if row.method == name):
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=name))
        else:
            ended = len([row for row in finished(rows) if row.method == name])
            label = f"{name}, the best of {ended}" if ended else f"{name}, always stopped"
            handles.append(Line2D([], [], color=colour, linestyle=(0, (5, 1.5)), label=label))
    if any(row.pruned and row.rho is not None for row in rows):
        handles.append(Line2D([], [], color="#999999", marker="x", linestyle="none", label="stopped early"))
    return handles
