"""Loss surfaces in three dimensions: drawn here once, for print and pages without scripts, and turned by script.js.

Both draw alike: an orthographic camera, the patches of the grid from the farthest to the nearest (a painter's order is
exact enough for a surface over a grid), one colour scale for all surfaces of a figure. Where the ends of the scale are
far apart (:func:`~flatwise.report.scales.needs_log`), heights and colours are those of the logarithm of the loss, and
the axis says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flatwise.report.charts import cut, px, svg
from flatwise.report.markup import Markup, tag
from flatwise.report.scales import Scale, needs_log, short

AZIMUTH, ELEVATION = 35.0, 28.0
"""Where the camera stands at first, in degrees."""
WIDTH, HEIGHT = 440, 360
STRETCH = 0.8
"""Height of the box, in halves of its side."""
MOST = 33
"""Points along a side that the drawing without script has at most."""
# Viridis (van der Walt and Smith, 2015), nine of its colours: even in lightness, also without colour vision.
COLOURS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip


@dataclass(frozen=True)
class Surface:
    """The loss of one model over a grid.

    Attributes:
        name: the model.
        losses: ``losses[i][j]`` is the loss at ``x[i], y[j]``; None where it is not known.
    """

    name: str
    losses: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Range:
    """The one scale of heights and colours of a figure.

    Attributes:
        low: lowest loss.
        high: highest loss that is told apart; higher ones are drawn at it.
        log: whether heights are logarithms.
    """

    low: float
    high: float
    log: bool

    def share(self, loss: float) -> float:
        """Place a loss between the ends.

        Args:
            loss: the loss.

        Returns:
            A number in [0, 1].
        """
        return Scale(self.low, self.high, 0.0, 1.0, self.log)(loss)


def common_range(surfaces: Sequence[Surface], log: bool | None = None) -> Range:
    """Find the scale that all surfaces share.

    Args:
        surfaces: at least one.
        log: a logarithmic scale; None: where it is needed.

    Returns:
        From the lowest loss to the highest.
    """
    known = [v for s in surfaces for row in s.losses for v in row if v is not None and math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if high - low < 1e-12 * max(1.0, abs(high)):
        high = low + max(1e-9, 1e-3 * abs(low))
    return Range(low, high, needs_log(low, high) if log is None else log)


def colour(share: float) -> tuple[int, int, int]:
    """Look up a colour.

    Args:
        share: in [0, 1], low to high.

    Returns:
        Red, green and blue, 0 to 255.
    """
    place = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    number = min(int(place), len(COLOURS) - 2)
    part = place - number
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(COLOURS[number], COLOURS[number + 1], strict=True))
    return red, green, blue


def project(x: float, y: float, z: float, azimuth: float = AZIMUTH, elevation: float = ELEVATION) -> tuple[float, ...]:
    """Look at a point of the box ``[-1, 1] x [-1, 1] x [0, 1]``.

    Args:
        x: along the first direction.
        y: along the second.
        z: height.
        azimuth: of the camera, in degrees.
        elevation: of the camera, in degrees.

    Returns:
        Right, down, and how near it is, in halves of the box's side.
    """
    a, e = math.radians(azimuth), math.radians(elevation)
    z = STRETCH * (2 * z - 1)
    right = x * math.cos(a) - y * math.sin(a)
    front = x * math.sin(a) + y * math.cos(a)
    return right, front * math.sin(e) - z * math.cos(e), front * math.cos(e) + z * math.sin(e)


def static_surface(surface: Surface, limits: Range, description: str) -> Markup:
    """Draw a surface from where the camera stands at first.

    Args:
        surface: the losses.
        limits: the scale of the figure.
        description: what can be seen, for screen readers.

    Returns:
        An ``svg`` element.
    """
    losses = [[None if v is None or not math.isfinite(v) else v for v in row] for row in surface.losses]
    rows, columns = _thinned(len(losses)), _thinned(len(losses[0]))
    scale = 0.29 * WIDTH

    def place(i: int, j: int, z: float) -> tuple[float, float, float]:
        right, down, near = project(2 * i / (len(losses) - 1) - 1, 2 * j / (len(losses[0]) - 1) - 1, z)
        return WIDTH / 2 + scale * right, HEIGHT / 2 + scale * down, near

    patches: list[tuple[float, Markup]] = []
    for i, k in pairwise(rows):
        for j, m in pairwise(columns):
            corners = [(i, j), (k, j), (k, m), (i, m)]
            heights = [losses[p][q] for p, q in corners]
            known = [limits.share(v) for v in heights if v is not None]
            if len(known) < 4:
                continue
            points = [place(p, q, z) for (p, q), z in zip(corners, known, strict=True)]
            red, green, blue = colour(sum(known) / 4)
            outline = "L".join(f"{px(x)} {px(y)}" for x, y, _near in points)
            path = tag("path", d=f"M{outline}Z", fill=f"#{red:02x}{green:02x}{blue:02x}")
            patches.append((sum(near for _x, _y, near in points), path))
    patches.sort(key=lambda patch: patch[0])
    last = (len(losses) - 1, len(losses[0]) - 1)
    floor = [place(i, j, 0.0) for i, j in ((0, 0), (last[0], 0), last, (0, last[1]))]
    outline = "L".join(f"{px(x)} {px(y)}" for x, y, _near in floor)
    name = tag("text", cut(surface.name, 40), tag("title", surface.name), x=WIDTH / 2, y=22, class_="name middle")
    return svg(
        name,
        tag("path", d=f"M{outline}Z", class_="floor"),
        tag("g", *(path for _near, path in patches), class_="patches"),
        title=f"Loss surface of {surface.name}",
        description=description,
        width=WIDTH,
        height=HEIGHT,
        kind="chart surface-static",
    )


def _thinned(count: int) -> list[int]:
    step = max(1, math.ceil((count - 1) / (MOST - 1)))
    return sorted({*range(0, count, step), count - 1})


def colour_bar(limits: Range) -> Markup:
    """Draw the scale of colours.

    Args:
        limits: the scale of the figure.

    Returns:
        An ``svg`` element.
    """
    scale = Scale(limits.low, limits.high, 14, WIDTH - 14, limits.log)
    steps = 48
    width = (WIDTH - 28) / steps
    boxes = [
        tag("rect", x=px(14 + n * width), y=4, width=px(width + 0.5), height=12, fill="#%02x%02x%02x" % colour(n / 47))  # noqa: UP031
        for n in range(steps)
    ]
    ticks = [tag("text", short(v), x=px(scale(v)), y=32, class_="tick middle") for v in scale.ticks(5)]
    name = "loss, on a logarithmic scale" if limits.log else "loss"
    return svg(
        *boxes,
        *ticks,
        tag("text", name, x=WIDTH / 2, y=50, class_="label middle"),
        title="Colours",
        description=f"{name}, from {short(limits.low)} (dark) to {short(limits.high)} (light)",
        width=WIDTH,
        height=56,
        kind="chart bar",
    )


def for_script(
    surfaces: Sequence[Surface], limits: Range, axes: tuple[str, str], ends: Sequence[float]
) -> dict[str, Any]:
    """Collect what script.js needs to draw the figure.

    Args:
        surfaces: the losses.
        limits: the scale of the figure.
        axes: names of the two directions.
        ends: where the first direction begins and ends, then the second.

    Returns:
        What JSON can hold.
    """
    scale = Scale(limits.low, limits.high, 0.0, 1.0, limits.log)
    return {
        "azimuth": AZIMUTH,
        "elevation": ELEVATION,
        "stretch": STRETCH,
        "colours": COLOURS,
        "axes": axes,
        "ends": [short(end) for end in ends],
        "ticks": [[scale(value), short(value)] for value in scale.ticks(4)],
        "unit": "log loss" if limits.log else "loss",
        # Heights, not losses: the scale is the same here and there.
        "surfaces": [
            {
                "name": surface.name,
                "heights": [
                    [None if v is None or not math.isfinite(v) else round(limits.share(v), 4) for v in row]
                    for row in surface.losses
                ],
            }
            for surface in surfaces
        ],
    }
