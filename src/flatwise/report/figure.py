"""A figure of the page: the drawing, its words, its numbers, and the same drawing as a file for a paper."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files

from flatwise.report.markup import Markup, join, tag


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        stem: name of its file.
        title: above it.
        drawing: what the page shows.
        caption: below it: what is drawn, and under which conditions.
        numbers: a table with what is drawn; empty where the drawing has too many.
        file: the drawing as a file of its own; None: ``drawing`` is one ``svg`` element, which serves.
        wide: it takes the whole width of the page.
    """

    stem: str
    title: str
    drawing: Markup
    caption: str
    numbers: Markup = field(default_factory=Markup)
    file: Markup | None = None
    wide: bool = False

    def svg(self) -> str:
        """Write the figure as a file.

        Returns:
            An SVG document that needs nothing else.
        """
        return standalone(self.drawing if self.file is None else self.file)


def figure(entry: Figure, level: str) -> Markup:
    """Put a figure into the page.

    Args:
        entry: the figure.
        level: of its heading.

    Returns:
        A ``figure`` element.
    """
    content = base64.b64encode(entry.svg().encode()).decode("ascii")
    links = tag(
        "p",
        "For a paper: ",
        tag("a", "SVG", href=f"data:image/svg+xml;base64,{content}", download=f"{entry.stem}.svg",
            aria_label=f"{entry.title}, as an SVG file"),
        tag("button", "PNG", type="button", class_="png", data_name=f"{entry.stem}.png", hidden=True,
            aria_label=f"{entry.title}, as a PNG file"),
        class_="files",
    )  # fmt: skip
    numbers = tag("details", tag("summary", "The numbers"), entry.numbers) if entry.numbers else Markup("")
    return tag(
        "figure",
        tag(level, entry.title),
        entry.drawing,
        tag("figcaption", entry.caption),
        links,
        numbers,
        class_="wide" if entry.wide else None,
    )


def asset(name: str) -> str:
    """Read a file that the page is made with.

    Args:
        name: of the file, beside this module in ``assets``.

    Returns:
        Its text.
    """
    return files("flatwise.report").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _light_rules() -> str:
    # Programs that draw for papers know no variables: the light colours are written in.
    palette = dict(re.findall(r"(--[\w-]+):\s*([^;]+);", asset("style.css").partition("}")[0]))
    rules = re.sub(r"var\((--[\w-]+)\)", lambda found: palette[found[1]], asset("chart.css"))
    return rules.replace(".chart ", "")


def standalone(drawing: Markup) -> str:
    """Make a file of a drawing: with its size, its style and a white ground.

    Args:
        drawing: an ``svg`` element.

    Returns:
        An SVG document.
    """
    start, _, rest = drawing.partition(">")
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', start)
    assert found is not None, start
    width, height = found.groups()
    ground = tag("rect", width=width, height=height, fill="#ffffff")
    style = tag("style", Markup(_light_rules()))
    return f'{start} width="{width}" height="{height}">{style}{ground}{rest}\n'


def side_by_side(drawings: list[Markup], width: int, height: int, below: Markup, below_height: int) -> Markup:
    """Join drawings of one size into one, with another below.

    Args:
        drawings: ``svg`` elements.
        width: of each.
        height: of each.
        below: an ``svg`` element of the same width.
        below_height: its height.

    Returns:
        An ``svg`` element.
    """

    def at(x: float, y: float, drawing: Markup, tall: int) -> Markup:
        place = f'<svg x="{x:g}" y="{y:g}" width="{width}" height="{tall}" '
        return Markup(drawing.replace("<svg ", place, 1))

    placed = [at(number * width, 0, drawing, height) for number, drawing in enumerate(drawings)]
    middle = (len(drawings) - 1) * width / 2
    return tag(
        "svg",
        join(*placed, at(middle, height, below, below_height)),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width * len(drawings)} {height + below_height}",
    )
