"""A study's tables on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flatwise.files import read_json
from flatwise.lab.paper.findings import find
from flatwise.lab.paper.layout import Grid, cells_of, choices_of, claims_of, quantities_of, ranks_of
from flatwise.lab.paper.spectra import spectra_findings
from flatwise.lab.paper.store import Stored
from flatwise.lab.table import print_sentences

if TYPE_CHECKING:
    from rich.console import Console


def show(stored: Stored, console: Console) -> None:
    """Print the tables, the claims, and where the size differs from the paper.

    Args:
        stored: the record.
        console: where to.
    """
    study, findings = stored.record.study, find(stored.record)
    console.print(f"{study.title} ({study.paper}); cells are {findings.quantity}", markup=False)
    grids = [cells_of(findings), quantities_of(findings), ranks_of(findings), choices_of(findings), claims_of(findings)]
    for grid in grids:
        if grid is not None:
            print_grid(grid, console)
    print_sentences([f"Differs from the paper: {text}." for text in study.differs], console)


def show_spectra(record: Path, console: Console) -> None:
    """Print the claims about the Hessian's spectrum.

    Args:
        record: what the benchmark wrote.
        console: where to.
    """
    print_grid(claims_of(spectra_findings(read_json(record))), console)
    console.print(f"Record: {record}", markup=False)


def print_grid(grid: Grid, console: Console) -> None:
    """Print a table, drawn on a terminal and in Markdown elsewhere.

    Args:
        grid: the table.
        console: where to.
    """
    if not console.is_terminal:
        console.print(grid.markdown(), markup=False, soft_wrap=True)
        console.print()
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.ROUNDED)
    for heading in grid.headings:
        table.add_column(heading.replace(": ", "\n"), overflow="fold")
    for row in grid.rows:
        # What is bold in Markdown is bold here too.
        table.add_row(*(_bold(word.replace(" / ", "\n")) for word in row))
    console.print(table)


def _bold(text: str) -> str:
    from rich.markup import escape

    pieces = escape(text).split("**")
    return "".join(f"[bold]{piece}[/bold]" if place % 2 else piece for place, piece in enumerate(pieces))
