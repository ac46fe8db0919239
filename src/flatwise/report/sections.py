"""The parts of a page about one comparison: results, curves, settings. What was measured is in flatness.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatwise.report.bands import Panel
from flatwise.report.charts import chart, lines_of, swatch
from flatwise.report.content import Comparison, Data
from flatwise.report.figure import Figure
from flatwise.report.forest import forest
from flatwise.report.markup import Markup, join, tag
from flatwise.report.scales import short
from flatwise.report.tables import Cell, definitions, table
from flatwise.report.words import EQUAL, Answer, difference, signed

ABOUT_THE_COMMAND = frozenset({"out", "fresh", "quiet"})
BADGES = {"better": "\u25b2 better", "worse": "\u25bc worse", "undecided": "\u25c6 undecided", EQUAL: "\u25c6 the same"}


def answer_cards(found: Sequence[Answer], order: Sequence[str]) -> Markup:
    """Write one card for each method: better, worse or undecided, by how much, and how sure that is.

    Args:
        found: the answers of one run.
        order: the methods in the order of their colours.

    Returns:
        A list.
    """
    cards = []
    for answer in found:
        kind = "same" if answer.verdict == EQUAL else answer.verdict
        badge = tag("span", BADGES[answer.verdict], class_=f"badge {kind}")
        who = tag("div", swatch(order.index(answer.name)), tag("span", answer.name), badge, class_="who")
        points = tag("div", f"{signed(answer.points)} points", class_="by")
        rest = difference(answer).partition("(")[2].removesuffix(")")
        cards.append(tag("li", who, points, tag("div", f"against {answer.reference}; {rest}", class_="subtle")))
    return tag("ul", *cards, class_="answers") if cards else Markup("")


def results_table(results: Data) -> Markup:
    """Write the table of results.

    Args:
        results: ``results.json``.

    Returns:
        The table.
    """
    reference, base = results["reference"], results["base"]
    noisy = any(record["wrong_labels_fitted"] is not None for record in results["methods"].values())
    headings = ["method", "rho", "test accuracy, %", f"minus {reference}, points", "validation accuracy, %"]
    headings += ["wrong labels learned, %"] if noisy else []
    headings += ["gradients a step", f"time / {base}", "wall time, s", "epochs"]
    rows = []
    for name, record in results["methods"].items():
        pair = results["paired"].get(name)
        row = [
            Cell(name),
            _rho(record),
            _estimate(record["test_accuracy"], 100),
            Cell("reference") if pair is None else _estimate(pair["difference"], 100, sign=True),
            _estimate(record["validation_accuracy"], 100),
        ]
        if noisy:
            row.append(_estimate(record["wrong_labels_fitted"], 100))
        row += [
            Cell(f"{record['gradient_evaluations_per_step']:.2f}", record["gradient_evaluations_per_step"]),
            _relative(record),
            Cell(f"{record['wall_time']['mean']:.1f}", record["wall_time"]["mean"]),
            Cell(str(record["epochs"]), record["epochs"]),
        ]
        rows.append(row)
    seeds = len(results["methods"][reference]["test_accuracy"]["per_seed"])
    spread = (
        f"means \u00b1 half the 95 % interval over {seeds} paired seeds" if seeds > 1 else "one seed, so no intervals"
    )
    return table(headings, rows, caption=f"Results after the last epoch: {spread}")


def _rho(record: Data) -> Cell:
    rho = record["options"].get("rho")
    if rho is None or isinstance(rho, str):  # "auto"
        return Cell(rho or "\N{EN DASH}")
    return Cell(f"{rho:g}", rho)


def _relative(record: Data) -> Cell:
    low, high = record["relative_time_quartiles"]
    spread = f" ({low:.2f}\N{EN DASH}{high:.2f})" if high > low else ""
    return Cell(f"{record['relative_time']:.2f}{spread}", record["relative_time"])


def _estimate(estimate: Mapping[str, Any] | None, scale: float, *, sign: bool = False) -> Cell:
    if estimate is None:
        return Cell("\N{EN DASH}")
    mean = scale * estimate["mean"]
    text = signed(mean) if sign else f"{mean:.1f}"
    half = estimate["ci95"]
    return Cell(text if half is None else f"{text} \u00b1 {scale * half:.1f}", mean)


def forest_figure(found: Sequence[Answer], stem: str) -> Figure:
    """Draw the differences.

    Args:
        found: the answers of one run, at least one.
        stem: name of the figure's file.

    Returns:
        The figure.
    """
    caption = (
        "Differences seed by seed and their 95 % intervals. An interval that crosses zero leaves the question open."
        if found[0].half is not None
        else "Differences from one seed, without an interval."
    )
    return Figure(stem, "Difference in test accuracy", forest(found), caption)


def curve_figures(panels: Sequence[Panel], seeds: int, stem: str) -> list[Figure]:
    """Draw the training curves.

    Args:
        panels: one a figure.
        seeds: how many runs each line stands for.
        stem: start of the figures' file names.

    Returns:
        The figures.
    """
    spread = f"Mean and 95 % interval over {seeds} seeds." if seeds > 1 else "One seed."
    figures = []
    for panel in panels:
        lines = lines_of(panel)
        drawing = chart(
            lines,
            title=panel.title,
            description=" ".join(_course(band.label, band.means) for band in panel.bands),
            horizontal="epoch",
            vertical=panel.unit,
            from_zero=panel.from_zero,
            whole=True,
        )
        name = f"{stem}-{panel.title.lower().replace(' ', '-')}"
        figures.append(Figure(name, panel.title, drawing, f"{panel.unit[:1].upper()}{panel.unit[1:]}. {spread}",
                              _numbers(panel)))  # fmt: skip
    return figures


def _course(label: str, means: Sequence[float]) -> str:
    if not means:
        return f"{label}: no epoch has a value."
    low, high = short(min(means)), short(max(means))
    return f"{label}: from {short(means[0])} to {short(means[-1])}, lowest {low}, highest {high}."


def _numbers(panel: Panel) -> Markup:
    epochs = sorted({place for band in panel.bands for place in band.positions})
    kept = epochs[:: max(1, len(epochs) // 12)]
    kept += [epochs[-1]] if epochs and epochs[-1] not in kept else []
    columns = [
        dict(zip(band.positions, zip(band.means, band.half_widths, strict=True), strict=True)) for band in panel.bands
    ]
    rows = [[Cell(f"{epoch:g}", epoch), *(_point(column.get(epoch)) for column in columns)] for epoch in kept]
    headings = ["epoch", *(band.label for band in panel.bands)]
    return table(headings, rows, caption=f"{panel.title}, {panel.unit}", sortable=False)


def _point(point: tuple[float, float] | None) -> Cell:
    if point is None:
        return Cell("\N{EN DASH}")
    mean, half = point
    return Cell(f"{short(mean)} \u00b1 {half:.2g}" if half else short(mean), mean)


def _exact(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings(comparison: Comparison, level: str) -> Markup:
    """Write the settings and the machine, and what repeats the comparison.

    Args:
        comparison: the run.
        level: of the headings.

    Returns:
        Markup.
    """
    results = comparison.results
    config, environment = results["config"], results["environment"]
    options = [
        (name, ", ".join(f"{key} = {_exact(value)}" for key, value in record["options"].items()) or "no options")
        for name, record in results["methods"].items()
    ]
    versions = [(name, str(version)) for name, version in environment.get("packages", {}).items() if version]
    machine = [(name.replace("_", " "), str(value)) for name, value in environment.items() if name != "packages"]
    plain = [
        (name.replace("_", " "), "\N{EN DASH}" if value is None else str(value))
        for name, value in config.items()
        if name not in ABOUT_THE_COMMAND
    ]
    blocks = (
        ("Settings", plain),
        ("Methods", options),
        ("Data", [(name.replace("_", " "), str(value)) for name, value in results["data"].items()]),
        ("Environment", [*versions, *machine]),
    )
    return join(
        tag("p", "This repeats it: ", tag("code", comparison.command)),
        *(join(tag(level, title), definitions(pairs)) for title, pairs in blocks),
    )
