"""Findings as tables of words, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatwise.lab.paper.findings import Cell, Findings, Judged, Row
from flatwise.lab.statistics import Estimate
from flatwise.measure.result import digits

NOTHING = "–"
MISSING = "missing"


@dataclass(frozen=True)
class Grid:
    """A table of words.

    Attributes:
        headings: one a column.
        rows: as many words each.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Write the table in Markdown.

        Returns:
            Its lines.
        """
        lines = [self.headings, tuple("---" for _ in self.headings), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells_of(findings: Findings) -> Grid:
    """Lay the paper's table out: in each cell the paper's number, ours, and the difference with its verdict.

    Args:
        findings: of a study.

    Returns:
        The table.
    """
    headings = ("method", *(f"{name}: paper / here / difference" for name in findings.columns), "gradients a step",
                "seconds")  # fmt: skip
    rows = [
        (row.arm, *(_cell(cell) for cell in row.cells), _number(row.gradients, 2), _number(row.seconds, 1))
        for row in findings.rows
    ]
    return Grid(headings, tuple(rows))


def quantities_of(findings: Findings) -> Grid | None:
    """Lay out what was measured of the trained weights.

    Args:
        findings: of a study.

    Returns:
        The table; None where nothing was measured.
    """
    names = list(dict.fromkeys((setting, name) for row in findings.rows for setting, name, _ in row.quantities))
    if not names:
        return None
    several = len({setting for setting, _ in names}) > 1
    headings = ("method", *(f"{setting}: {name}" if several else name for setting, name in names))
    rows = []
    for row in findings.rows:
        found = {(setting, name): value for setting, name, value in row.quantities}
        rows.append((row.arm, *(spread(found.get(key)) for key in names)))
    return Grid(headings, tuple(rows))


def choices_of(findings: Findings) -> Grid:
    """Lay out what the held-out tenth chose.

    Args:
        findings: of a study.

    Returns:
        The table.
    """
    rows = []
    for row in findings.rows:
        found = dict(row.choices)
        rows.append((row.arm, *(_choice(found.get(name)) for name in findings.columns)))
    return Grid(("method", *findings.columns), tuple(rows))


def claims_of(findings: Findings) -> Grid:
    """Lay the claims out.

    Args:
        findings: of a study.

    Returns:
        The table.
    """
    rows = [(claim.text, claim.where, f"**{claim.verdict}**", _parts(claim)) for claim in findings.claims]
    return Grid(("claim", "where", "here", "paired difference, 95 % interval"), tuple(rows))


def ranks_of(findings: Findings) -> Grid | None:
    """Lay the rank correlations out.

    Args:
        findings: of a study.

    Returns:
        The table; None where there are none.
    """
    if not findings.ranks:
        return None
    rows = tuple((name.replace("_", "-"), spread(value)) for name, value in findings.ranks)
    return Grid(("measure", "Kendall's tau with the generalisation gap"), rows)


def spread(value: Estimate | None) -> str:
    """Write an estimate.

    Args:
        value: mean and interval.

    Returns:
        Such as ``"12.3 ± 1.4"``.
    """
    return MISSING if value is None else digits(value.mean, value.ci95)


def _signed(value: Estimate) -> str:
    text = digits(value.mean, value.ci95)
    return text if value.mean < 0 else f"+{text}"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return NOTHING
    words = [cell.printed or NOTHING, spread(cell.ours)]
    if cell.difference is not None:
        words.append(_signed(cell.difference) + ("" if cell.verdict is None else f" **{cell.verdict}**"))
    return " / ".join(words)


def _parts(claim: Judged) -> str:
    words = []
    for name, difference, verdict in claim.parts:
        text = MISSING if difference is None else f"{_signed(difference)} {claim.unit}".rstrip()
        words.append(f"{name}: {text}" + (f" ({verdict})" if len(claim.parts) > 1 else ""))
    return "; ".join(words)


def _choice(choice: Mapping[str, Any] | None) -> str:
    if choice is None:
        return NOTHING
    if not choice:
        return MISSING
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in choice.items())


def _number(value: float | None, places: int) -> str:
    return NOTHING if value is None else f"{value:.{places}f}"


__all__: Sequence[str] = [
    "Grid", "Row", "cells_of", "choices_of", "claims_of", "quantities_of", "ranks_of", "spread",
]  # fmt: skip
