"""From finished trainings to rows: the radius that validation chose, and what it gives on the test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flatwise.lab.board.plan import BASE, LONGER, Entry, Task, entries
from flatwise.lab.board.store import Store
from flatwise.lab.statistics import Estimate, estimate, paired_difference
from flatwise.lab.timing import in_training

Result = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A method at one radius.

    Attributes:
        rho: the radius; None for the base.
        validation: mean validation accuracy.
        test: test accuracy.
        difference: test accuracy minus the base's, seed by seed; None for the base.
        gradients: gradient evaluations per step, in whole batches.
    """

    rho: float | None
    validation: float
    test: Estimate
    difference: Estimate | None
    gradients: float


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Attributes:
        method: its name.
        seeds: from how many seeds every radius was trained.
        points: one for each radius, rising.
        best: the point with the highest validation accuracy; at a tie, the smaller radius.
        cost: time of the training relative to the base's; None where it was not timed.
        quartiles: of that time.
    """

    method: str
    seeds: int
    points: tuple[Point, ...]
    best: Point
    cost: float | None
    quartiles: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """``"better"`` or ``"worse"`` than the base if the 95 % interval says so, else ``"open"``; "" for the base."""
        difference = self.best.difference
        if difference is None:
            return ""
        if difference.ci95 is None:
            return "open"
        if difference.mean - difference.ci95 > 0:
            return "better"
        return "worse" if difference.mean + difference.ci95 < 0 else "open"

    @property
    def edge(self) -> str:
        """Whether the chosen radius is the ``"largest"`` or ``"smallest"`` of those tried, else ""."""
        if len(self.points) < 2:
            return ""
        return {0: "smallest", len(self.points) - 1: "largest"}.get(self.points.index(self.best), "")


def rows_of(task: Task, methods: Sequence[str], store: Store) -> list[Row]:
    """Summarise what was trained on a task.

    Args:
        task: the task.
        methods: names, of which those are left out that were not trained at every radius from some common seed.
        store: the finished trainings.

    Returns:
        The rows, the highest test accuracy first.
    """
    base = store.runs(task, entries(task, BASE)[0])
    rows = [row for name in methods if (row := _row(task, name, store, base)) is not None]
    return sorted(rows, key=lambda row: -row.best.test.mean)


def _row(task: Task, method: str, store: Store, base: dict[int, Result]) -> Row | None:
    found = [(entry, store.runs(task, entry)) for entry in entries(task, method)]
    # Only seeds that every radius and the base have: otherwise luck of the seed would pass for merit of the radius.
    seeds = sorted(set(base).intersection(*(runs for _, runs in found)))
    if not seeds:
        return None
    points = tuple(
        _point(entry, [runs[seed] for seed in seeds], [base[seed] for seed in seeds]) for entry, runs in found
    )
    best = max(points, key=lambda point: point.validation)
    step = store.timing(task).get(BASE if method == LONGER else method)
    cost, quartiles = None, None
    if step is not None:
        ratio, bounds = in_training(step, best.gradients)
        longer = 2 if method == LONGER else 1
        cost, quartiles = longer * ratio, (longer * bounds[0], longer * bounds[1])
    return Row(method, len(seeds), points, best, cost, quartiles)


def _point(entry: Entry, runs: Sequence[Result], base: Sequence[Result]) -> Point:
    tests = [run["test_accuracy"] for run in runs]
    return Point(
        rho=entry.rho,
        validation=estimate([run["validation_accuracy"] for run in runs]).mean,
        test=estimate(tests),
        difference=None if entry.method == BASE else paired_difference(tests, [run["test_accuracy"] for run in base]),
        gradients=estimate([run["gradient_evaluations_per_step"] for run in runs]).mean,
    )


def front(rows: Sequence[Row]) -> list[Row]:
    """Find the rows that no other beats in both cost and mean accuracy.

    Args:
        rows: those without a cost are left out.

    Returns:
        The Pareto front, the cheapest first.
    """
    kept: list[Row] = []
    for row in sorted(
        (row for row in rows if row.cost is not None), key=lambda row: (row.cost or 0.0, -row.best.test.mean)
    ):
        if not kept or row.best.test.mean > kept[-1].best.test.mean:
            kept.append(row)
    return kept


def progress(task: Task, method: str, seeds: int, store: Store) -> tuple[int, int]:
    """Count the trainings of a method.

    Args:
        task: the task.
        method: the method.
        seeds: how many seeds make a whole row.
        store: the finished trainings.

    Returns:
        How many are done, and how many there are to be.
    """
    wanted = entries(task, method)
    done = sum(len([seed for seed in store.runs(task, entry) if seed < seeds]) for entry in wanted)
    return done, seeds * len(wanted)
