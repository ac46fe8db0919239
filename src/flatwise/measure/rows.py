"""What a table of sharpness is made of: rows that carry their settings, error, cost and meaning."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatwise.errors import UnknownNameError
from flatwise.measure.result import Conditions, Cost, digits, plain


@dataclass(frozen=True)
class Row:
    """One measure of one model.

    Attributes:
        name: such as ``"one_step"``.
        value: the number; NaN where the loss or its gradient is not finite.
        standard_error: None where none can be told.
        error_over: what the error is over, such as ``"8 parts"`` of the data; empty without one.
        settings: the radius, the norm, m, the steps, the draws: whatever the number depends on.
        gradient_evaluations: what this row cost beyond the rows above it.
        seconds: what this row took beyond the rows above it.
        meaning: one plain sentence.
    """

    name: str
    value: float
    standard_error: float | None
    error_over: str
    settings: Mapping[str, Any]
    gradient_evaluations: float
    seconds: float
    meaning: str

    def number(self) -> str:
        """Write the value with its standard error.

        Returns:
            Such as ``"0.0123 ± 0.0014"``.
        """
        return digits(self.value, self.standard_error)

    def set_at(self) -> str:
        """Write the settings.

        Returns:
            Such as ``"rho=0.05, p=2, steps=1"``.
        """
        shown = {key: value for key, value in self.settings.items() if not key.startswith("error_of")}
        return ", ".join(f"{key}={_short(value)}" for key, value in shown.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Sharpness:
    """How sharp a minimum is, by several measures.

    Attributes:
        rows: one for each measure.
        loss: at w, on all samples.
        cautions: what a reader should know before using the numbers, in sentences.
        conditions: under which they were measured.
        cost: of all.
    """

    rows: tuple[Row, ...]
    loss: float
    cautions: tuple[str, ...]
    conditions: Conditions
    cost: Cost

    def row(self, name: str) -> Row:
        """Find a row.

        Args:
            name: such as ``"one_step"``.

        Returns:
            The row.

        Raises:
            UnknownNameError: if there is none of this name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UnknownNameError("row", name, [row.name for row in self.rows])

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold.

        Returns:
            All fields.
        """
        result: dict[str, Any] = plain(self)
        return result

    def _cells(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [
            ("measure", "value ± standard error", "settings", "error over", "gradients", "seconds")
        ]
        for row in self.rows:
            spent = f"{row.gradient_evaluations:.3g}", f"{row.seconds:.2g}"
            lines.append((row.name, row.number(), row.set_at(), row.error_over, *spent))
        return lines

    def _foot(self) -> str:
        c = self.conditions
        shared = f" on {c.processes} processes" if c.processes > 1 else ""
        return (
            f"{c.samples} samples in parts of at most {c.micro_batch_size}, mode {c.mode!r}, {c.weights} weights, "
            f"seed {c.seed}; {self.cost.gradient_evaluations:.3g} gradient evaluations, "
            f"{self.cost.seconds:.2g} s{shared}"
        )

    def _remarks(self) -> list[str]:
        c = self.conditions
        remarks = [f"Caution: {sentence}" for sentence in self.cautions]
        remarks += [f"Note: {sentence}" for sentence in c.notes]
        if c.unused:
            remarks.append(f"Note: the loss does not depend on {', '.join(c.unused)}")
        if c.frozen:
            remarks.append(f"Note: frozen, and left out: {', '.join(c.frozen)}")
        return remarks

    def __str__(self) -> str:
        """Write an aligned table, what each row means, and the cautions."""
        width = max(len(row.name) for row in self.rows)
        meanings = [f"{row.name:<{width}}  {row.meaning}" for row in self.rows]
        return "\n".join([*aligned(self._cells()), "", *meanings, "", self._foot(), *self._remarks()])

    def _repr_html_(self) -> str:
        meanings = ["meaning", *(row.meaning for row in self.rows)]
        lines = [(*cells, meaning) for cells, meaning in zip(self._cells(), meanings, strict=True)]
        remarks = "".join(f"<li>{html.escape(text)}</li>" for text in self._remarks())
        return f"{html_table(lines)}<p>{html.escape(self._foot())}</p><ul>{remarks}</ul>"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Align a table; the first line is its head.

    Args:
        lines: cells of each line.

    Returns:
        The lines, with one of dashes below the head.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    written = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [written[0], "  ".join("-" * w for w in widths), *written[1:]]


def html_table(lines: Sequence[Sequence[str]]) -> str:
    """Write a table for a notebook; the first line is its head. What it holds is escaped.

    Args:
        lines: cells of each line.

    Returns:
        HTML.
    """
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in lines[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
