"""A plane as a file to be turned by hand: the page's own figure, alone on a page of its own."""

from __future__ import annotations

from pathlib import Path

from flatwise.errors import UserError
from flatwise.files import write_atomically
from flatwise.measure.landscape_result import Landscape
from flatwise.report.document import document
from flatwise.report.figure import figure
from flatwise.report.markup import tag
from flatwise.report.planes import plane_figure, plane_of


def write(landscape: Landscape, path: str | Path, *, log: bool | None, clip: float | None, title: str | None) -> None:
    """Write the surfaces of a plane as one HTML file that needs nothing else.

    Args:
        landscape: complete or not.
        path: the file.
        log: a logarithmic scale; None: where it is needed.
        clip: the largest value that is drawn.
        title: above everything.

    Raises:
        UserError: for a line.
    """
    if landscape.dimensions != 2:
        raise UserError("a line has nothing to turn: draw it with .plot('line.svg')")
    plane = plane_of(landscape, log=log, clip=clip)
    entry = plane_figure(plane, landscape.names, Path(path).stem)
    heading = title or entry.title
    html = document(heading, tag("header", tag("h1", heading), class_="top"), tag("main", figure(entry, "h2")))
    write_atomically(Path(path), lambda file: file.write(html.encode()))
