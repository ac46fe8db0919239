"""The parts of a page about how flat the trained weights are: the table of sharpness and the spectrum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatwise.measure.result import digits
from flatwise.report.charts import Line, chart
from flatwise.report.content import Data
from flatwise.report.figure import Figure
from flatwise.report.markup import Markup, join, tag
from flatwise.report.scales import short
from flatwise.report.tables import Cell, table
from flatwise.report.words import listed

MOST = 400
"""Points of a spectrum that are drawn."""
DEPTH = 1e-6
"""A density below this share of its peak is drawn at the floor."""


def sharpness_table(measures: Mapping[str, Data], level: str, cautions: Sequence[str] = ()) -> Markup:
    """Write the measures of all methods side by side.

    Args:
        measures: by the method.
        level: of the headings.
        cautions: about all methods together.

    Returns:
        The table with its conditions and cautions; empty where nothing was measured.
    """
    tables = {name: entry["sharpness"] for name, entry in measures.items() if entry.get("sharpness")}
    if not tables:
        return Markup("")
    first = next(iter(tables.values()))
    rows, notes = [], []
    for name, there in side_by_side(tables).items():
        cells = [_value(there.get(method)) for method in tables]
        spent = max(row["gradient_evaluations"] for row in there.values())
        rows.append([Cell(name.replace("_", " ")), *cells, Cell(f"{spent:.3g}", spent)])
        words, meaning = setting_words(shared_settings(there)), next(iter(there.values()))["meaning"]
        notes.append(join(meaning, " ", tag("span", words, class_="set")) if words else meaning)
    headings = ["measure", *tables, "cost, gradients"]
    caption = f"Sharpness \u00b1 standard error; less is flatter. {condition_words(first['conditions'])}"
    seconds = sum(entry["cost"]["seconds"] for entry in tables.values())
    cautions = caution_words(tables, cautions)
    return join(
        table(headings, rows, caption=caption, notes=notes),
        tag(
            "p",
            f"A gradient is one forward and backward pass over all samples. In all, {seconds:.0f} s.",
            class_="subtle",
        ),
        join(tag(level, "Cautions"), tag("ul", *(tag("li", text) for text in cautions), class_="plain"))
        if cautions
        else "",
    )


def side_by_side(tables: Mapping[str, Data]) -> dict[str, dict[str, Data]]:
    """Put the rows of several tables of sharpness beside one another.

    Args:
        tables: by the method, each with ``rows``.

    Returns:
        For each measure the row of each method that has it.
    """
    found: dict[str, dict[str, Data]] = {}
    for method, table_of in tables.items():
        for row in table_of["rows"]:
            found.setdefault(row["name"], {})[method] = row
    return found


def caution_words(tables: Mapping[str, Data], common: Sequence[str] = ()) -> list[str]:
    """Collect the cautions, each with the methods that it is about where it is not about all.

    Args:
        tables: by the method, each with ``cautions``.
        common: about all methods together; they come first.

    Returns:
        Sentences.
    """
    found: dict[str, list[str]] = {}
    for method, table_of in tables.items():
        for text in table_of["cautions"]:
            found.setdefault(text, []).append(method)
    measures = sorted(side_by_side(tables), key=len, reverse=True)
    return [
        *(_sentence(text, measures) for text in common),
        *(_sentence(text, measures, () if len(methods) == len(tables) else methods) for text, methods in found.items()),
    ]


def _sentence(text: str, measures: Sequence[str], about: Sequence[str] = ()) -> str:
    """Write a caution as a sentence, in which measures are called what they are called in the table."""
    for name in measures:
        text = text.replace(name, name.replace("_", " "))
    text = f"{text.removesuffix('.')}."
    if about:
        return f"{listed(about)}: {text}"
    return text if text.startswith(("w ", "m-")) else f"{text[:1].upper()}{text[1:]}"  # w and m are symbols


def shared_settings(rows: Mapping[str, Data]) -> dict[str, Any]:
    """Find the settings in which all rows agree: the rest was found out on the way.

    Args:
        rows: of one measure, by the method.

    Returns:
        Names and values.
    """
    first, *others = (row["settings"] for row in rows.values())
    return {
        key: value
        for key, value in first.items()
        if not key.startswith("error_of") and all(other.get(key) == value for other in others)
    }


def _value(row: Data | None) -> Cell:
    if row is None or row["value"] is None:
        return Cell("\N{EN DASH}")
    return Cell(digits(row["value"], row["standard_error"]).replace("-", "\N{MINUS SIGN}"), row["value"])


def setting_words(settings: Mapping[str, Any]) -> str:
    """Write what a number was measured with.

    Args:
        settings: names and values.

    Returns:
        Such as ``"rho = 0.05, m = 128"``.
    """
    parts = [
        f"{key.replace('_', ' ')} = {value:.3g}" if isinstance(value, float) else f"{key.replace('_', ' ')} = {value}"
        for key, value in settings.items()
    ]
    return ", ".join(parts)


def condition_words(conditions: Data) -> str:
    """Say under which conditions something was measured.

    Args:
        conditions: as a result carries them.

    Returns:
        Sentences.
    """
    modes = {"eval": "evaluation mode", "train": "training mode", "as is": "the model's own mode"}
    text = (
        f"{conditions['samples']:,} samples, {conditions['weights']:,} weights, "
        f"{modes.get(conditions['mode'], conditions['mode'])}, {conditions['dtype']} on {conditions['device']}, "
        f"seed {conditions['seed']}."
    )
    return " ".join([text, *(note if note.endswith(".") else f"{note}." for note in conditions["notes"])])


def spectrum_figure(measures: Mapping[str, Data], order: Sequence[str], stem: str) -> Figure | None:
    """Draw the density of the Hessian's eigenvalues.

    Args:
        measures: by the method.
        order: the methods in the order of their colours.
        stem: name of the figure's file.

    Returns:
        The figure, or None where no density was measured.
    """
    found = {name: entry["density"] for name, entry in measures.items() if entry.get("density")}
    if not found:
        return None
    peak = max(value for density in found.values() for value in density["density"])
    lines = [_line(name, density, order.index(name)) for name, density in found.items()]
    ends = [(name, density["smallest"], density["largest"]) for name, density in found.items()]
    words = [f"{name}: eigenvalues from {short(low)} to {short(high)}." for name, low, high in ends]
    drawing = chart(
        lines,
        title="Spectrum of the Hessian",
        description=" ".join(words),
        horizontal="eigenvalue",
        vertical="density, logarithmic",
        log=True,
        floor=peak * DEPTH,
    )
    rows = [[Cell(name), Cell(short(low), low), Cell(short(high), high)] for name, low, high in ends]
    conditions = next(iter(found.values()))["conditions"]
    caption = (
        "How many eigenvalues are where, each smeared out over a Gaussian; the band is over the random probes. "
        f"{condition_words(conditions)}"
    )
    numbers = table(["method", "smallest", "largest"], rows, caption="Ends of the spectrum")
    return Figure(stem, "Spectrum of the Hessian", drawing, caption, numbers, wide=len(found) > 2)


def _line(name: str, density: Data, number: int) -> Line:
    # More points than can be told apart make the page heavy.
    step = max(1, len(density["grid"]) // MOST)
    grid, values, low, high = (density[key][::step] for key in ("grid", "density", "low", "high"))
    return Line(name, grid, values, low, high, number)
