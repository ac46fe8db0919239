"""Lines with bands as SVG: readable in light and dark, without colour, and as a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flatwise.report.bands import Panel
from flatwise.report.markup import Markup, tag
from flatwise.report.scales import Scale, short, spread

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, BOTTOM = 58, 14, 46
CHARACTER = 8.0
"""Mean width of a character of 14 pixels, which letters have on a phone, for laying out the legend."""
DASHES = ("", "9 3", "2 3", "9 3 2 3", "5 2", "14 4")
LABEL = 30


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: what it is called.
        x: places, rising.
        y: heights; None leaves a gap.
        low: lower edge of its band, or empty.
        high: upper edge.
        number: of its colour and dash, the same in every chart of a page; None: its place in this chart.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    number: int | None = None


def lines_of(panel: Panel) -> list[Line]:
    """Turn the bands of a panel into curves whose bands are cut at the panel's limits.

    Args:
        panel: one pair of axes.

    Returns:
        One for each band.
    """
    lowest, highest = panel.limits or (-math.inf, math.inf)
    return [
        Line(
            band.label,
            band.positions,
            band.means,
            [max(lowest, mean - half) for mean, half in zip(band.means, band.half_widths, strict=True)],
            [min(highest, mean + half) for mean, half in zip(band.means, band.half_widths, strict=True)],
        )
        for band in panel.bands
    ]


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    horizontal: str,
    vertical: str,
    log: bool = False,
    from_zero: bool = False,
    whole: bool = False,
    floor: float | None = None,
) -> Markup:
    """Draw curves on one pair of axes.

    Args:
        lines: the curves, each with its own colour and dash.
        title: for screen readers.
        description: what can be seen, for screen readers.
        horizontal: name of the horizontal axis.
        vertical: name of the vertical axis.
        log: make the vertical axis logarithmic.
        from_zero: begin the vertical axis at 0.
        whole: ticks of the horizontal axis are whole numbers.
        floor: lowest height that is shown; what is below is drawn there.

    Returns:
        An ``svg`` element.
    """

    def usable(value: float | None) -> bool:
        return value is not None and math.isfinite(value) and (not log or value > 0)

    numbers = [place if line.number is None else line.number for place, line in enumerate(lines)]
    rows, top = _legend([line.label for line in lines], numbers)
    heights = [v for line in lines for v in (*line.y, *line.low, *line.high) if v is not None and usable(v)]
    if floor is not None:
        heights = [max(v, floor) for v in heights]
    places = [x for line in lines for x in line.x]
    if not heights or not places:
        heights, places = [0.1, 1.0], [0.0, 1.0]
    low, high = spread(heights, log=log, from_zero=from_zero)
    left, right = min(places), max(places)
    if left == right:
        left, right = left - 1, right + 1
    x = Scale(left, right, LEFT + 8, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, top, log)
    drawn = [_grid(x, y, horizontal, vertical, whole)]
    for number, line in zip(numbers, lines, strict=True):
        drawn.append(_band(line, x, y, number, usable))
    for number, line in zip(numbers, lines, strict=True):
        drawn.append(_curve(line, x, y, number, usable))
    return svg(*drawn, *rows, title=title, description=description, width=WIDTH, height=HEIGHT)


def svg(*children: Markup, title: str, description: str, width: int, height: int, kind: str = "chart") -> Markup:
    """Wrap a drawing, with the words that stand for it.

    Args:
        *children: what is drawn.
        title: its name.
        description: what can be seen.
        width: of the drawing's own pixels.
        height: likewise.
        kind: a class.

    Returns:
        An ``svg`` element.
    """
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        class_=kind,
        role="img",
        aria_label=f"{title}. {description}",
    )


def swatch(number: int) -> Markup:
    """Draw a piece of a curve, for a legend outside the chart.

    Args:
        number: which curve.

    Returns:
        An ``svg`` element that screen readers pass over.
    """
    line = tag("line", x1=0, y1=5, x2=26, y2=5, class_=f"line s{number % 6}", stroke_dasharray=_dash(number))
    return tag("svg", line, viewBox="0 0 26 10", width=26, height=10, aria_hidden="true", class_="chart swatch")


def cut(label: str, length: int = LABEL) -> str:
    """Shorten a long name.

    Args:
        label: the name.
        length: the most characters.

    Returns:
        The name, or its start and its end.
    """
    half = (length - 1) // 2
    return label if len(label) <= length else f"{label[:half]}\N{HORIZONTAL ELLIPSIS}{label[-half:]}"


def _dash(number: int) -> str | None:
    return DASHES[number % len(DASHES)] or None


def _legend(labels: Sequence[str], numbers: Sequence[int]) -> tuple[list[Markup], float]:
    """Lay out the legend in rows, and say where the axes may begin."""
    entries, x, y = [], float(LEFT), 16.0
    for number, label in zip(numbers, labels, strict=True):
        shown = cut(label)
        width = 36 + CHARACTER * len(shown)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + 18
        entries.append(
            tag(
                "g",
                tag("line", x1=px(x), y1=px(y - 4), x2=px(x + 26), y2=px(y - 4), class_=f"line s{number % 6}",
                    stroke_dasharray=_dash(number)),
                tag("text", shown, tag("title", label), x=px(x + 32), y=px(y), class_="name"),
            )
        )  # fmt: skip
        x += width + 14
    return entries, y + 14


def px(value: float) -> str:
    """Write a place in a drawing.

    Args:
        value: pixels.

    Returns:
        With one decimal at most.
    """
    return f"{value:.1f}".removesuffix(".0")


def _grid(x: Scale, y: Scale, horizontal: str, vertical: str, whole: bool) -> Markup:
    parts = []
    for value in y.ticks():
        height = px(y(value))
        parts.append(tag("line", x1=LEFT, y1=height, x2=WIDTH - RIGHT, y2=height, class_="grid"))
        parts.append(tag("text", short(value), x=LEFT - 7, y=height, class_="tick end", dy="0.33em"))
    ticks = [value for value in x.ticks(6) if not whole or value == round(value)]
    parts += [tag("text", short(v), x=px(x(v)), y=HEIGHT - BOTTOM + 19, class_="tick middle") for v in ticks]
    base = HEIGHT - BOTTOM
    parts.append(tag("line", x1=LEFT, y1=base, x2=WIDTH - RIGHT, y2=base, class_="axis"))
    parts.append(tag("text", horizontal, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, class_="label middle"))
    middle = px((y.start + y.end) / 2)
    parts.append(tag("text", vertical, x=13, y=middle, class_="label middle", transform=f"rotate(-90 13 {middle})"))
    return tag("g", *parts, aria_hidden="true")


def _band(line: Line, x: Scale, y: Scale, number: int, usable: Callable[[float | None], bool]) -> Markup:
    if not line.low:
        return Markup("")
    rows = [
        (x(place), y(low), y(high))
        for place, low, high in zip(line.x, line.low, line.high, strict=True)
        if low is not None and high is not None and usable(high)
        for low in [low if usable(low) else y.low]
    ]
    if len(rows) < 2 or all(low == high for _x, low, high in rows):
        return Markup("")
    there = [f"{px(place)} {px(high)}" for place, _low, high in rows]
    back = [f"{px(place)} {px(low)}" for place, low, _high in reversed(rows)]
    return tag("path", d=f"M{'L'.join(there + back)}Z", class_=f"band s{number % 6}")


def _curve(line: Line, x: Scale, y: Scale, number: int, usable: Callable[[float | None], bool]) -> Markup:
    parts, pen = [], "M"
    for place, height in zip(line.x, line.y, strict=True):
        if height is None or not usable(height):
            pen = "M"
            continue
        parts.append(f"{pen}{px(x(place))} {px(y(height))}")
        pen = "L"
    if len(parts) == 1:  # one point makes no line
        cx, cy = parts[0][1:].split(" ")
        return tag("circle", cx=cx, cy=cy, r=4, class_=f"dot s{number % 6}")
    return tag("path", d="".join(parts), class_=f"line s{number % 6}", stroke_dasharray=_dash(number))
