"""The methods as a table, and one of them in full."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flatwise.variants import Variant

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 340
"""Columns of a table that goes to a file: a method is one line, which can be searched."""


def print_variants(rows: Sequence[Variant], console: Console) -> None:
    """Print what there is to choose from.

    Args:
        rows: the methods.
        console: where to. On a terminal, two things share a column, so that 80 columns are enough.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = console.is_terminal
    padding = (0, 1, 0, 0) if terminal else (0, 1)
    table = Table(box=box.SIMPLE_HEAD if terminal else box.MARKDOWN, expand=terminal, padding=padding)
    headings = ("name, what it changes", "gradients", "memory", "rho (usual)", "source, evidence")
    parted = ("name", "what it changes", "gradients", "memory", "rho", "usual rho", "source", "evidence")
    for number, heading in enumerate(headings if terminal else parted):
        if terminal:
            table.add_column(
                heading, ratio=(1, None, None, None, 1)[number], width=(None, 15, 6, 13, None)[number], overflow="fold"
            )
        else:
            table.add_column(heading)
    for row in rows:
        low, high = row.rho_range
        if terminal:
            radius = f"{row.rho:g}\n({low:g}-{high:g})"
            cells = [f"[bold]{row.name}[/]\n{row.summary}", row.passes, row.memory, radius]
            table.add_row(*cells, f"{row.source}\n[bold]{row.evidence}[/]")
        else:
            cells = [row.name, row.summary.replace("|", "\\|"), row.passes, row.memory, f"{row.rho:g}"]
            table.add_row(*cells, f"{low:g}-{high:g}", row.source, row.evidence)
    if terminal:
        console.print(table)
    else:
        Console(file=console.file, force_terminal=False, width=PLAIN_WIDTH, highlight=False).print(table)
    for sentence in (
        "gradients: forward and backward passes over the whole batch in a step; plain training has 1. memory: kept "
        "between steps, in copies of the parameters; during a step there is at least one more. rho: the default, and "
        "what is usual for this method: radii of different methods are not comparable.",
        "flatwise variants NAME says everything about a method.",
    ):
        for line in textwrap.wrap(sentence, min(console.width, 120)):
            console.print(line, markup=False)


def print_variant(row: Variant, console: Console) -> None:
    """Print everything about a method.

    Args:
        row: the method.
        console: where to.
    """
    low, high = row.rho_range
    options = ", ".join(f"{name}={value!r}" for name, value in row.options.items())
    needs = ", ".join(f"{name}=..." for name in row.needs)
    kinds = (row.own,) if row.own else (row.direction, row.descent, row.schedule)
    entries = {
        "changes": row.summary,
        "slots": ", ".join(row.slots) or "none: this is the method itself",
        "gradients a step": row.passes,
        "kept between steps": f"{row.memory} copies of the parameters",
        "rho": f"{row.rho:g}, usual {low:g} to {high:g} (for this method alone)",
        "options": options or "none beside the shared ones",
        "must be given": needs or "nothing",
        "made of": ", ".join(kind.__name__ for kind in kinds),
        "source": row.source,
        "evidence": row.evidence,
        "call": f"flatwise.create({row.name!r}, base{', ' + needs if needs else ''})",
    }
    console.print(row.name, markup=False)
    for name, text in entries.items():
        lines = textwrap.wrap(text, max(20, min(console.width, 120) - 22))
        for number, line in enumerate(lines):
            console.print(f"  {name if number == 0 else '':<20}{line}", markup=False)
