"""The table of ``flatwise measure``: the measures of all methods side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flatwise.lab.table import PLAIN_WIDTH, print_sentences
from flatwise.report.flatness import caution_words, condition_words, setting_words, shared_settings, side_by_side

if TYPE_CHECKING:
    from rich.console import Console


def print_measures(entries: dict[str, Any], cautions: list[str], console: Console) -> None:
    """Print the table and what a reader should know before using it.

    Args:
        entries: of measures.json, by the method.
        cautions: about all of them together.
        console: where to.
    """
    from rich import box
    from rich.table import Table

    from flatwise.measure.result import digits

    sharp = {name: entry["sharpness"] for name, entry in entries.items()}
    narrow = console.is_terminal and console.width < PLAIN_WIDTH
    table = Table(box=box.SIMPLE_HEAD if narrow else box.ROUNDED if console.is_terminal else box.MARKDOWN)
    table.add_column("measure", overflow="fold", min_width=12)
    table.add_column("settings", overflow="fold")
    for name in sharp:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("gradients", justify="right")
    for found in side_by_side(sharp).values():
        first = next(iter(found.values()))
        cells = [
            digits(found[name]["value"], found[name]["standard_error"])
            if name in found and found[name]["value"] is not None
            else "-"
            for name in sharp
        ]
        spent = max(row["gradient_evaluations"] for row in found.values())
        table.add_row(first["name"].replace("_", " "), setting_words(shared_settings(found)), *cells, f"{spent:.3g}")
    console.print(table)
    sentences = [f"{row['name'].replace('_', ' ')}: {row['meaning']}" for row in next(iter(sharp.values()))["rows"]]
    sentences.append(condition_words(next(iter(sharp.values()))["conditions"]))
    sentences += [f"Caution: {text}" for text in caution_words(sharp, cautions)]
    print_sentences(sentences, console)
