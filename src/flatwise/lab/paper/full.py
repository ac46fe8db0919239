"""A row of the paper at its own size: its trainings one after the other, on whatever devices they are started on.

Rho is the paper's own, as its tables print it; ``rows.rho_search`` has the trainings that choose it anew. What has
finished is read, so an interrupted row goes on with the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flatwise.files import write_json
from flatwise.lab.paper.experiments import experiment, experiment_names
from flatwise.lab.paper.layout import Grid, spread
from flatwise.lab.paper.record import differences
from flatwise.lab.paper.rows import Run, runs
from flatwise.lab.paper.tables import table, table_names
from flatwise.lab.paper.tasks import result_of
from flatwise.lab.paper.verdicts import judge_more
from flatwise.lab.statistics import Estimate, estimate, paired_difference
from flatwise.lab.train import train

BASES = ("base", "base-2x")
HELD_OUT_TABLES = ("8",)
"""Tables that print the error on the held-out tenth."""


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


def paper_name(word: str) -> str:
    """Turn a word of the command line into the name of an experiment.

    Args:
        word: such as ``"table4"``, ``"4"`` or ``"late-phase"``.

    Returns:
        Such as ``"4"`` or ``"late"``.
    """
    short = word.removeprefix("table").removesuffix("-phase")
    return short if short in experiment_names() else word


def trainings(name: str, row: str | None, seeds: int, out: Path, data_root: str | None = None) -> list[Run]:
    """List the trainings of a table, or of one of its rows.

    Args:
        name: of the experiment.
        row: of the table; None: all.
        seeds: how many of the paper's seeds.
        out: folder of the trainings.
        data_root: folder in which to look for the data.

    Returns:
        The trainings.
    """
    rows = experiment(name).rows if row is None else (row,)
    found = [run for one in rows for run in runs(name, one, out=str(out)) if run.seed < seeds]
    return [replace(run, config=replace(run.config, data_root=data_root)) for run in found]


def run_full(name: str, wanted: Sequence[Run], *, shown: bool) -> None:
    """Train what is missing.

    Args:
        name: of the experiment.
        wanted: its trainings.
        shown: whether a line is printed after each training.
    """
    left = [run for run in wanted if result_of(run.config) is None]
    for number, run in enumerate(left, start=1):
        train(run.config)
        if shown:
            where = f"{run.row}, {run.cell}, {run.role}, seed {run.seed}"
            print(f"table {name}: {number} of {len(left)} trainings ({where})", file=sys.stderr, flush=True)


def full_grid(name: str, wanted: Sequence[Run]) -> Grid:
    """Lay out what finished trainings gave beside what the paper prints.

    Args:
        name: of the experiment.
        wanted: its trainings.

    Returns:
        A line for each method of each cell, that is missing where a training is.
    """
    lower = name not in table_names() or table(name).better == "lower"
    quantity = "error, %" if lower else "accuracy, %"
    values = values_of(wanted, lower=lower)
    lines = []
    for place, found in values.items():
        base = reference(place, values, lower=lower)
        difference = None if base is None or found is None else paired_difference(found, base)
        words = ["–", "–"]
        if difference is not None:
            up = Estimate([], -difference.mean if lower else difference.mean, difference.ci95)
            words = [spread(difference), f"better: {judge_more(up)}"]
        ours = None if found is None else estimate(found)
        lines.append((place.row, place.cell, place.role, printed(name, place) or "–", spread(ours), *words))
    heads = ("row", "cell", "method", f"paper's {quantity}", "here", "minus the base's", "is it better?")
    return Grid(heads, tuple(lines))


def values_of(wanted: Sequence[Run], *, lower: bool) -> dict[Place, list[float] | None]:
    """Read the test accuracies or errors; of Table 8 those on the held-out tenth, which it prints.

    Args:
        wanted: the trainings.
        lower: errors instead of accuracies.

    Returns:
        In percent, seed by seed; None where one is missing.
    """
    found: dict[Place, list[float | None]] = {}
    for run in wanted:
        result = result_of(run.config)
        quantity = "validation_accuracy" if run.table in HELD_OUT_TABLES else "test_accuracy"
        accuracy = None if result is None else result.get(quantity)
        value = None if accuracy is None else 100 * (1 - accuracy if lower else accuracy)
        found.setdefault(Place(run.row, run.cell, run.role), []).append(value)
    whole = {place: [value for value in row if value is not None] for place, row in found.items()}
    return {place: row if len(row) == len(found[place]) else None for place, row in whole.items()}


def reference(place: Place, values: Mapping[Place, list[float] | None], *, lower: bool) -> list[float] | None:
    """Find what a method is compared with: the base in its own row, or the row of SGD.

    Args:
        place: of the method.
        values: of all.
        lower: whether lower is better.

    Returns:
        Of the base for once and twice the epochs the better, as the paper reports it; None where there is none, or
        one of the two is missing.
    """
    if place.role in BASES:
        return None
    for row in (place.row, "sgd"):
        places = [Place(row, place.cell, role) for role in BASES]
        rows = [values[base] for base in places if base in values]
        bases = [found for found in rows if found is not None]
        if len(bases) < len(rows):  # the one that is missing might be the better
            return None
        if bases:
            return min(bases, key=lambda found: sum(found) if lower else -sum(found))
    return None


def printed(name: str, place: Place) -> str | None:
    """Look up what the paper prints.

    Args:
        name: of the experiment.
        place: the cell and the method.

    Returns:
        The number as printed; None where the paper prints none.
    """
    if name not in table_names() or place.role == "first":  # the row's number is of the training after that one
        return None
    kind = "base" if place.role in BASES else "sam"
    found = table(name)
    for column in (place.cell, f"{place.cell}/{kind}", f"top1/{kind}", f"{place.cell}/error"):
        if place.row in found.rows and column in found.columns:
            number = found.number(place.row, column)
            return None if number is None else number.printed
    return None


def write_full(path: Path, name: str, wanted: Sequence[Run]) -> None:
    """Write a record of what has finished.

    Args:
        path: the file.
        name: of the experiment.
        wanted: its trainings.
    """
    lines: list[dict[str, Any]] = []
    for run in wanted:
        result = result_of(run.config)
        if result is not None:
            kept = {
                key: result.get(key)
                for key in ("test_accuracy", "validation_accuracy", "seconds", "gradient_evaluations_per_step")
            }
            where = {"row": run.row, "cell": run.cell, "role": run.role, "seed": run.seed}
            lines.append({**where, "config": differences(run.config), **kept, "environment": result.get("environment")})
    write_json(path, {"table": name, "scale": "full", "trainings": lines})
