"""What trainings at the paper's size gave, beside what the paper prints: three numbers a cell, and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flatwise.lab.paper.full_quantities import Quantity, quantities_of
from flatwise.lab.paper.layout import MISSING, NOTHING, Grid, spread
from flatwise.lab.paper.rows import Run
from flatwise.lab.paper.tables import table, table_names
from flatwise.lab.paper.tasks import result_of
from flatwise.lab.paper.verdicts import judge_more, judge_same
from flatwise.lab.statistics import estimate, paired_difference

BASES = ("base", "base-2x")
AGAINST = {"8": "0", "11": "1", "c4": "second-order"}
"""Rows that the others are compared with, where these are not those of SGD."""
SAME = 0.2
"""Points by which Table 11's numbers of steps may differ and still be the same: the paper's differ by at most 0.13."""


@dataclass(frozen=True)
class Place:
    """A cell of the paper and one of the methods in it.

    Attributes:
        row: of the table.
        cell: of the row.
        role: the method.
    """

    row: str
    cell: str
    role: str


@dataclass(frozen=True)
class Found:
    """The values of a place.

    Attributes:
        values: seed by seed; None where one is missing.
        word: what to say then.
    """

    values: tuple[float, ...] | None
    word: str = MISSING


def reference_row(name: str) -> str:
    """Name the row that the others of a table are compared with, where the base is none of their own trainings.

    Args:
        name: of the experiment.

    Returns:
        A row, which the table may lack.
    """
    return AGAINST.get(name, "sgd")


def full_grid(name: str, wanted: Sequence[Run], others: Sequence[Run] = ()) -> Grid:
    """Lay out what finished trainings gave beside what the paper prints.

    Args:
        name: of the experiment.
        wanted: its trainings.
        others: trainings of the row that these are compared with, if it is not among them.

    Returns:
        A line for each method and quantity of each cell; what is missing is said to be missing.
    """
    lines = []
    for quantity in quantities_of(name):
        values = values_of([*wanted, *others], quantity)
        for place in dict.fromkeys(Place(run.row, run.cell, run.role) for run in wanted):
            found = values[place]
            other = reference(name, place, values, lower=quantity.claim != "higher")
            words = (NOTHING, NOTHING) if other is None else _compared(name, quantity, place, found, other, values)
            ours = found.word if found.values is None else spread(estimate(found.values))
            text = printed(name, place, quantity) or NOTHING
            lines.append((place.row, place.cell, place.role, quantity.name, text, ours, *words, *_cost(wanted, place)))
    heads = ("row", "cell", "method", "quantity", "paper", "here", "difference", "the claim", "gradients a step",
             "hours a training")  # fmt: skip
    return Grid(heads, tuple(lines))


def about(name: str) -> list[str]:
    """Say what the table claims and what its differences are.

    Args:
        name: of the experiment.

    Returns:
        Sentences.
    """
    row = reference_row(name)
    said = [f"The paper's claim: {table(name).claim}"] if name in table_names() else []
    said.append("Difference: paired, with its 95 % interval, from the better of the base's trainings in the same row, "
                f"else from row {row}.")  # fmt: skip
    if name == "11":
        said.append("The paper's sharpness is of the error rate of a batch; here it is the rise of its cross-entropy.")
    return said


def values_of(wanted: Sequence[Run], quantity: Quantity) -> dict[Place, Found]:
    """Read a quantity of all trainings.

    Args:
        wanted: the trainings.
        quantity: what to read.

    Returns:
        Seed by seed, or why not.
    """
    runs: dict[Place, list[Run]] = {}
    for run in wanted:
        runs.setdefault(Place(run.row, run.cell, run.role), []).append(run)
    found = {}
    for place, row in runs.items():
        values = [quantity.read(run) for run in row]
        known = tuple(value for value in values if value is not None)
        broken = sum("broken" in (result_of(run.config) or {}) for run in row)
        word = f"{broken} of {len(row)} broke down" if broken else MISSING
        found[place] = Found(known if len(known) == len(row) else None, word)
    return found


def reference(name: str, place: Place, values: Mapping[Place, Found], *, lower: bool) -> Place | None:
    """Find what a method is compared with: the base in its own row, or another row.

    Args:
        name: of the experiment.
        place: of the method.
        values: of all.
        lower: whether lower is better.

    Returns:
        Of the base for once and twice the epochs the better, as the paper reports it, or one that is missing, since
        it might be the better; None where there is none.
    """
    if place.role in BASES or place.row == reference_row(name):
        return None
    known = [other for other in values if other.role in BASES and (other.row, other.cell) == (place.row, place.cell)]
    if not known:
        known = [other for other in values if other.row == reference_row(name)]
        cells = {other.cell for other in known}
        if len(cells) > 1:  # a single cell stands for all: its trainings are the same for every radius
            known = [other for other in known if other.cell == place.cell]
        if name in ("8", "11"):
            known = [other for other in known if other.role == place.role]
    for other in known:
        if values[other].values is None:
            return other
    return min(known, key=lambda other: sum(values[other].values or ()) * (1 if lower else -1), default=None)


def printed(name: str, place: Place, quantity: Quantity) -> str | None:
    """Look up what the paper prints.

    Args:
        name: of the experiment.
        place: the cell and the method.
        quantity: of the training.

    Returns:
        The number as printed; None where the paper prints none.
    """
    number = _number(name, place, quantity)
    return None if number is None else number[0]


def _number(name: str, place: Place, quantity: Quantity) -> tuple[str, float | None] | None:
    if name not in table_names() or place.role == "first":  # the row's number is of the training after that one
        return None
    kind, known = "base" if place.role in BASES else "sam", table(name)
    for column in (words.format(cell=place.cell, kind=kind) for words in quantity.columns):
        if place.row in known.rows and column in known.columns:
            number = known.number(place.row, column)
            return None if number is None else (number.printed, number.usable)
    return None


def _compared(
    name: str, quantity: Quantity, place: Place, found: Found, other: Place, values: Mapping[Place, Found]
) -> tuple[str, str]:
    base = values[other]
    if base.values is None:
        return f"{base.word}: {other.row}, {other.role}", MISSING
    if found.values is None:
        return MISSING, MISSING
    difference = paired_difference(found.values, base.values)
    if quantity.claim == "same":
        return spread(difference), f"the same to {SAME:g}: {judge_same(difference, SAME)}"
    claim = quantity.claim
    better: str = "better" if quantity.is_score else claim
    if quantity.is_score and _loses(name, place, other, quantity):  # in one cell of the paper SAM does
        claim, better = ("higher" if claim == "lower" else "lower"), "worse"
    up = difference if claim == "higher" else replace(difference, mean=-difference.mean)
    return spread(difference), f"{better}: {judge_more(up)}"


def _loses(name: str, place: Place, other: Place, quantity: Quantity) -> bool:
    ours, its = (_number(name, where, quantity) for where in (place, other))
    if ours is None or its is None or ours[1] is None or its[1] is None:
        return False
    return ours[1] > its[1] if quantity.claim == "lower" else ours[1] < its[1]


def _cost(wanted: Sequence[Run], place: Place) -> tuple[str, str]:
    results = [result_of(run.config) or {} for run in wanted if Place(run.row, run.cell, run.role) == place]
    words = []
    for key, unit in (("gradient_evaluations_per_step", 1), ("seconds", 3600)):
        known = [float(result[key]) for result in results if result.get(key) is not None]
        words.append(f"{sum(known) / len(known) / unit:.2f}" if known else NOTHING)
    return words[0], words[1]
