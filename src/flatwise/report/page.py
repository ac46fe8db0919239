"""The page: one HTML file that needs no network, no other file and, to be read, no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flatwise.report.bands import Panel
from flatwise.report.content import Comparison, Missing
from flatwise.report.document import document
from flatwise.report.figure import Figure, figure
from flatwise.report.flatness import sharpness_table, spectrum_figure
from flatwise.report.markup import Markup, join, tag
from flatwise.report.planes import Plane, plane_figure
from flatwise.report.sections import answer_cards, curve_figures, forest_figure, results_table, settings
from flatwise.report.tables import Cell, table
from flatwise.report.words import answers, difference, headline, is_flatter, listed, question


@dataclass(frozen=True)
class Page:
    """A page and its figures as files.

    Attributes:
        html: the page.
        figures: SVG documents by file name.
    """

    html: str
    figures: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """One comparison, ready to be shown.

    Attributes:
        comparison: the run.
        panels: the training curves.
        plane: the loss around the weights, or None.
    """

    comparison: Comparison
    panels: Sequence[Panel]
    plane: Plane | None = None


def make_page(entries: Sequence[Entry], *, made: str) -> Page:
    """Make the page.

    Args:
        entries: one a comparison, at least one.
        made: when and by what, for the foot of the page.

    Returns:
        The page.
    """
    figures: dict[str, str] = {}
    several = len(entries) > 1
    articles = [_article(entry, number if several else 0, figures) for number, entry in enumerate(entries, start=1)]
    title = question([entry.comparison for entry in entries])
    overview = _overview(entries) if several else _answer(entries[0].comparison)
    html = document(
        title,
        tag("a", "To the results", href="#main", class_="skip"),
        tag("header", tag("h1", title), overview, _navigation(entries), class_="top"),
        tag("main", *articles, id="main"),
        tag("footer", tag("p", made)),
    )
    return Page(html, figures)


def _answer(comparison: Comparison) -> Markup:
    found = answers(comparison)
    return join(
        tag("p", headline(found), class_="headline"),
        answer_cards(found, list(comparison.results["methods"])),
        tag("p", comparison.protocol, class_="subtle"),
    )


def _overview(entries: Sequence[Entry]) -> Markup:
    rows = []
    for number, entry in enumerate(entries, start=1):
        for answer in answers(entry.comparison):
            link = tag("a", entry.comparison.name, href=f"#run{number}")
            rows.append([Cell(link), Cell(answer.name), Cell(answer.verdict), Cell(difference(answer), answer.points)])
    words = [
        tag("li", f"{entry.comparison.name}: ", tag("strong", headline(answers(entry.comparison)))) for entry in entries
    ]
    return join(
        tag("ul", *words, class_="plain"),
        table(["comparison", "method", "verdict", "difference"], rows, caption="All comparisons", numbers=False),
    )


SECTIONS = ("Results", "Curves", "Flatness", "Settings")


def _navigation(entries: Sequence[Entry]) -> Markup:
    if len(entries) > 1:
        links = [(entry.comparison.name, f"#run{number}") for number, entry in enumerate(entries, start=1)]
    else:
        links = [(name, f"#{name.lower()}") for name in SECTIONS]
    return tag(
        "nav",
        tag("ul", *(tag("li", tag("a", name, href=target)) for name, target in links)),
        aria_label="On this page",
    )


def _article(entry: Entry, number: int, files: dict[str, str]) -> Markup:
    comparison, results = entry.comparison, entry.comparison.results
    prefix = f"run{number}-" if number else ""
    level = ("h3", "h4") if number else ("h2", "h3")

    def figures(*found: Figure | None) -> Markup:
        kept = [one for one in found if one is not None]
        files.update({f"{one.stem}.svg": one.svg() for one in kept})
        return tag("div", *(figure(one, level[1]) for one in kept), class_="figures") if kept else Markup("")

    def section(name: str, *content: str) -> Markup:
        key = f"{prefix}{name.lower()}"
        return tag("section", tag(level[0], name, id=f"{key}-name"), *content, id=key, aria_labelledby=f"{key}-name")

    found = answers(comparison)
    order = list(comparison.trained)
    seeds = len(results["methods"][results["reference"]]["test_accuracy"]["per_seed"])
    body = [
        section(
            "Results",
            results_table(results),
            tag(
                "div",
                tag("ul", *(tag("li", sentence) for sentence in results["verdict"]), class_="plain"),
                figures(forest_figure(found, f"{prefix}difference") if found else None),
                class_="beside",
            ),
            _missing(comparison.missing),
        ),
        section(
            "Curves",
            figures(*curve_figures(entry.panels, seeds, f"{prefix}curves")),
        ),
        section(
            "Flatness",
            *(tag("p", sentence) for sentence in is_flatter(comparison) or [_nothing(comparison)]),
            figures(plane_figure(entry.plane, order, f"{prefix}landscape") if entry.plane else None),
            sharpness_table(comparison.measures, level[1], comparison.cautions),
            figures(spectrum_figure(comparison.measures, order, f"{prefix}spectrum")),
        ),
        section("Settings", settings(comparison, level[1])),
    ]
    if not number:
        return join(*body)
    return tag("article", tag("h2", comparison.name), _answer(comparison), *body, id=f"run{number}")


def _nothing(comparison: Comparison) -> str:
    if comparison.measures:
        return f"Measured: {listed(list(comparison.measures))}."
    return "How flat the trained weights are has not been measured yet."


def _missing(missing: Sequence[Missing]) -> Markup:
    if not missing:
        return Markup("")
    return tag(
        "div",
        tag("p", "Not on this page yet:"),
        tag("ul", *(tag("li", f"{entry.what}: ", tag("code", entry.command)) for entry in missing)),
        class_="missing",
    )
