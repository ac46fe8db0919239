"""Tables that can be sorted, by mouse and keyboard, where the browser runs scripts, and read where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flatwise.report.markup import Markup, join, tag


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        content: text, or markup.
        value: what it is sorted by; None: it is sorted by its text, and numbers come first.
    """

    content: str
    value: float | None = None


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    caption: str,
    sortable: bool = True,
    numbers: bool = True,
    notes: Sequence[str] = (),
) -> Markup:
    """Write a table inside a frame that scrolls sideways on a narrow screen.

    Args:
        headings: one a column.
        rows: the first cell of each names the row.
        caption: what the table holds.
        sortable: give each heading a button that sorts.
        numbers: all columns but the first hold numbers.
        notes: under each row, over its whole width, one text; empty: no notes.

    Returns:
        A ``div`` element.
    """
    columns = [
        tag("th", tag("button", heading, type="button", class_="sort") if sortable else heading, scope="col",
            aria_sort="none" if sortable else None, class_="number" if numbers and number else None)
        for number, heading in enumerate(headings)
    ]  # fmt: skip
    groups = []
    for number, row in enumerate(rows):
        cells = [
            tag("th" if place == 0 else "td", cell.content, scope="row" if place == 0 else None,
                class_="number" if numbers and place else None, data_value=cell.value)
            for place, cell in enumerate(row)
        ]  # fmt: skip
        lines = [tag("tr", *cells)]
        if notes:
            lines.append(tag("tr", tag("td", tag("div", notes[number]), colspan=len(headings)), class_="note"))
        # A body for each row keeps the row and its note together when they are sorted.
        groups.append(tag("tbody", *lines))
    body = join(tag("caption", tag("span", caption)), tag("thead", tag("tr", *columns)), *groups)
    return tag(
        "div",
        tag("table", body, class_="sortable" if sortable else None),
        class_="scroll",
        role="region",
        tabindex=0,
        aria_label=caption,
    )


def definitions(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Write names and what they stand for.

    Args:
        pairs: name and text.

    Returns:
        A ``dl`` element.
    """
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", text)) for name, text in pairs))
