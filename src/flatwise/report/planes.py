"""The loss around each model, as the page shows it: surfaces that turn together, or lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flatwise.measure.landscape_result import Landscape
from flatwise.report.captions import facts_of, limits_of
from flatwise.report.charts import Line, chart
from flatwise.report.figure import Figure, side_by_side
from flatwise.report.heights import heights_of
from flatwise.report.markup import Markup, data_block, tag
from flatwise.report.scales import short
from flatwise.report.surface3d import (
    AZIMUTH,
    ELEVATION,
    HEIGHT,
    WIDTH,
    Surface,
    colour_bar,
    common_range,
    for_script,
    static_surface,
)
from flatwise.report.tables import Cell, table


@dataclass(frozen=True)
class Plane:
    """Losses over a plane, or over a line, on one grid for all models.

    Attributes:
        axes: names of the directions; one of them for a line.
        x: steps along the first direction.
        y: steps along the second; empty for a line.
        surfaces: the losses; for a line each has one value in every row.
        caption: directions, samples, batch normalisation: all that the drawing depends on.
        log: a logarithmic scale; None: where it is needed.
    """

    axes: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    surfaces: Sequence[Surface]
    caption: str
    log: bool | None = None


def plane_of(landscape: Landscape, *, log: bool | None = None, clip: float | None = None) -> Plane:
    """Turn a landscape, complete or not, into what a page draws: the same heights and words as on paper.

    Args:
        landscape: the losses.
        log: a logarithmic scale; None: where it is needed.
        clip: the largest loss that is drawn.

    Returns:
        What a page draws. A landscape without a finite loss is refused.
    """
    heights = heights_of(landscape, log, clip)
    grids = heights.values if landscape.dimensions == 2 else heights.values[..., None]
    surfaces = [
        Surface(name, [[value if math.isfinite(value) else None for value in row] for row in grid.tolist()])
        for name, grid in zip(landscape.names, grids, strict=True)
    ]
    notes = [note if note.endswith(".") else f"{note}." for note in landscape.conditions.notes]
    return Plane(
        # How they are scaled is in the caption.
        axes=[label.partition(",")[0] for label in landscape.labels],
        x=landscape.axes[0],
        y=landscape.axes[1] if landscape.dimensions == 2 else (),
        surfaces=surfaces,
        caption=" ".join([f"{' · '.join(facts_of(landscape, heights))}.", limits_of(landscape), *notes]),
        log=heights.log,
    )


def plane_figure(plane: Plane, order: Sequence[str], stem: str) -> Figure:
    """Draw the losses.

    Args:
        plane: the losses.
        order: the models in the order of their colours.
        stem: name of the figure's file.

    Returns:
        The figure.
    """
    return _surfaces(plane, stem) if plane.y else _lines(plane, order, stem)


def _known(surface: Surface) -> list[float]:
    return [value for row in surface.losses for value in row if value is not None]


def _middle(surface: Surface) -> float | None:
    row = surface.losses[len(surface.losses) // 2]
    return row[len(row) // 2]


def _words(surface: Surface) -> str:
    known, middle = _known(surface), _middle(surface)
    at = "" if middle is None else f"Loss {short(middle)} in the middle, at the trained weights; "
    return f"{at}from {short(min(known))} to {short(max(known))} over the plane." if known else "Nothing is known yet."


def _numbers(plane: Plane) -> Markup:
    rows = []
    for surface in plane.surfaces:
        known = _known(surface) or [float("nan")]
        middle = _middle(surface)
        rows.append([Cell(surface.name), *(_cell(value) for value in (middle, min(known), max(known)))])
    return table(["model", "loss in the middle", "lowest", "highest"], rows, caption="Ends of the drawn losses")


def _cell(value: float | None) -> Cell:
    return Cell("not known") if value is None else Cell(short(value), value)


def _surfaces(plane: Plane, stem: str) -> Figure:
    limits = common_range(plane.surfaces, plane.log)
    still = [static_surface(surface, limits, _words(surface)) for surface in plane.surfaces]
    bar = colour_bar(limits)
    ends = (plane.x[0], plane.x[-1], plane.y[0], plane.y[-1])
    data = for_script(plane.surfaces, limits, (plane.axes[0], plane.axes[1]), ends)
    boxes = [
        tag(
            "div",
            tag("p", surface.name),
            tag("canvas", tabindex=0, role="img", aria_label=f"Loss surface of {surface.name}. {_words(surface)} "
                "The arrow keys turn all surfaces together."),
            drawing,
            class_="surface",
        )
        for surface, drawing in zip(plane.surfaces, still, strict=True)
    ]  # fmt: skip
    camera = tag(
        "div",
        tag("label", "Turn", tag("input", type="range", name="azimuth", min=-180, max=180, value=AZIMUTH)),
        tag("label", "Tilt", tag("input", type="range", name="elevation", min=-10, max=90, value=ELEVATION)),
        tag("button", "Reset view", type="button", class_="reset"),
        class_="camera",
        role="group",
        aria_label="Camera of all surfaces",
    )
    group = tag(
        "div", data_block(data), tag("div", *boxes, class_="surfaces"), _bar(bar), camera, class_="surfaces-group"
    )
    caption = f"{plane.caption} All surfaces have one scale and one camera: drag, or use the arrow keys."
    return Figure(
        stem,
        "The loss around the trained weights",
        group,
        caption,
        _numbers(plane),
        file=side_by_side(still, WIDTH, HEIGHT, bar, 56),
        wide=True,
    )


def _bar(drawing: Markup) -> Markup:
    return tag("div", drawing, class_="bar")


def _lines(plane: Plane, order: Sequence[str], stem: str) -> Figure:
    lines = [
        Line(surface.name, plane.x, [row[0] for row in surface.losses], number=order.index(surface.name))
        for surface in plane.surfaces
    ]
    limits = common_range(plane.surfaces, plane.log)
    drawing = chart(
        lines,
        title="The loss along a line through the trained weights",
        description=" ".join(f"{surface.name}: {_words(surface)}" for surface in plane.surfaces),
        horizontal=f"step along the {plane.axes[0]}",
        vertical="loss, logarithmic" if limits.log else "loss",
        log=limits.log,
    )
    return Figure(stem, "The loss along a line", drawing, plane.caption, _numbers(plane))
