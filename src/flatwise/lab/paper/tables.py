"""The numbers and settings that Foret et al. (ICLR 2021) print, their known errors beside them.

``numbers.toml`` and ``settings.toml`` hold them. A printed number is never replaced: where it is wrong, ``error`` says
why, ``correct`` is what should stand there (None where nobody knows), and ``usable`` is what to compare with.

>>> from flatwise.lab.paper.tables import table
>>> table("1").number("wrn28-10-basic", "cifar100/sam").printed
'16.5±0.2'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from flatwise.errors import UnknownNameError
from flatwise.lab.toml import read_toml

HERE = Path(__file__).parent
PREFIX = "table-"
# 2.1±<0.1 (label): a value, its spread, which may be an upper limit, and a name.
NUMBER = re.compile(r"(?P<value>[\d.]+)(?:±(?P<below><?)(?P<spread>[\d.]+))?(?: \((?P<label>[^)]+)\))?")


@dataclass(frozen=True)
class Number:
    """One printed number.

    Attributes:
        printed: as in the paper.
        value: the number alone.
        spread: half the interval, or the standard deviation; the table says which. None where none is printed.
        below: the spread is printed as an upper limit.
        label: the name printed beside it, such as that of a previous method.
        error: why the printed number is wrong; empty where it is not.
        correct: what should stand there; None where that is not known or nothing is wrong.
    """

    printed: str
    value: float
    spread: float | None = None
    below: bool = False
    label: str = ""
    error: str = ""
    correct: float | None = None

    @property
    def usable(self) -> float | None:
        """The number to compare with: the corrected one where the printed one is wrong, None where none is known."""
        return self.correct if self.error else self.value


@dataclass(frozen=True)
class Table:
    """One table, or a figure with printed numbers or a claim.

    Attributes:
        name: its number, or a word for a figure.
        title: what it is about.
        quantity: what the numbers are.
        better: whether lower or higher numbers are better.
        spread: what stands behind ±; empty where nothing does.
        claim: what the paper concludes from it.
        rows: names of the rows, as printed from top to bottom.
        columns: names of the columns, as cell/method where a method has a column.
        numbers: (row, column) to number; an empty cell is missing.
    """

    name: str
    title: str
    quantity: str
    better: Literal["lower", "higher"]
    spread: str
    claim: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    numbers: Mapping[tuple[str, str], Number] = field(repr=False)

    @property
    def cells(self) -> tuple[str, ...]:
        """What a row has a number for, the methods left out: data sets, noise levels, models."""
        return tuple(dict.fromkeys(column.partition("/")[0] for column in self.columns))

    def number(self, row: str, column: str) -> Number | None:
        """Look a number up.

        Args:
            row: one of ``rows``.
            column: one of ``columns``.

        Returns:
            The number, or None where the paper prints none.

        Raises:
            UnknownNameError: no such row or column.
        """
        for kind, word, known in (("row", row, self.rows), ("column", column, self.columns)):
            if word not in known:
                raise UnknownNameError(f"{kind} of table {self.name}", word, known)
        return self.numbers.get((row, column))


@dataclass(frozen=True)
class Erratum:
    """Something that the paper prints wrongly.

    Attributes:
        where: the place.
        printed: what stands there.
        correct: what should.
    """

    where: str
    printed: str
    correct: str


def table_names() -> tuple[str, ...]:
    """List the tables and figures.

    Returns:
        Their names.
    """
    return tuple(name.removeprefix(PREFIX) for name in _numbers() if name.startswith(PREFIX))


@cache
def table(name: str) -> Table:
    """Read a table.

    Args:
        name: one of ``table_names()``.

    Returns:
        The table.

    Raises:
        UnknownNameError: no such table.
    """
    if name not in table_names():
        raise UnknownNameError("table", name, table_names())
    content = _numbers()[PREFIX + name]
    columns = tuple(content["columns"])
    wrong = _errors(content.get("errors", ()))
    numbers = {}
    for row, text in content["rows"].items():
        for column, cell in zip(columns, text.split("|"), strict=True):
            if cell.strip() != "–":
                numbers[row, column] = read_number(cell.strip(), *wrong.get((row, column), ("", None)))
    words = {key: content[key] for key in ("title", "quantity", "better", "spread", "claim")}
    return Table(
        name=name, rows=tuple(content["rows"]), columns=columns, numbers=MappingProxyType(numbers), **words
    )  # fmt: skip


def read_number(text: str, error: str = "", correct: float | None = None) -> Number:
    """Take a printed number apart.

    Args:
        text: such as "2.1±<0.1" or "5.3 (TBMSL-Net)".
        error: what is wrong about it.
        correct: what it should be.

    Returns:
        The number.
    """
    found = NUMBER.fullmatch(text)
    assert found is not None, f"no number: {text!r}"
    spread = None if found["spread"] is None else float(found["spread"])
    return Number(text, float(found["value"]), spread, bool(found["below"]), found["label"] or "", error, correct)


def errata() -> tuple[Erratum, ...]:
    """List what the paper prints wrongly, formulas and words included.

    Returns:
        The errors, in the order of the paper.
    """
    return tuple(Erratum(**entry) for entry in _numbers()["errata"])


@cache
def settings() -> dict[str, Any]:
    """Read the settings that the paper prints, as ``settings.toml`` holds them.

    Returns:
        Tables 6 and 7, ImageNet, fine-tuning, label noise and the search for rho.
    """
    return read_toml(HERE / "settings.toml")


@cache
def _numbers() -> dict[str, Any]:
    return read_toml(HERE / "numbers.toml")


def _errors(entries: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[str, float | None]]:
    found: dict[tuple[str, str], tuple[str, float | None]] = {}
    for entry in entries:
        rows = {**entry.get("correct", {}), **dict.fromkeys(entry.get("unknown", ()))}
        found.update({(row, entry["column"]): (entry["why"], correct) for row, correct in rows.items()})
    return found
