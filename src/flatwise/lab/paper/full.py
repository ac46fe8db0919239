"""A row of the paper at its own size: its trainings one after the other, on whatever devices they are started on.

Rho is the paper's own, as its tables print it, or chosen anew on a held-out tenth (:func:`tuned`). What has finished is
read, so an interrupted row goes on with the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flatwise.errors import TrainingError, UserError
from flatwise.files import write_json
from flatwise.lab.paper.experiments import experiment, experiment_names
from flatwise.lab.paper.full_quantities import MEASURES
from flatwise.lab.paper.full_table import reference_row
from flatwise.lab.paper.measures import measure_trained, measured
from flatwise.lab.paper.protocol import held_out
from flatwise.lab.paper.record import differences
from flatwise.lab.paper.rows import Run, rho_search, runs
from flatwise.lab.paper.tasks import broke_down, result_of
from flatwise.lab.train import train

TUNABLE = ("1", "2", "3", "4", "5")
"""Tables whose rho was chosen; in the others it is what the rows or cells are about, or fixed."""
KEPT = ("test_accuracy", "test_top5_accuracy", "validation_accuracy", "seconds", "gradient_evaluations_per_step")


def paper_name(word: str) -> str:
    """Turn a word of the command line into the name of an experiment.

    Args:
        word: such as ``"table4"``, ``"4"`` or ``"late-phase"``.

    Returns:
        Such as ``"4"`` or ``"late"``.
    """
    short = word.removeprefix("table").removesuffix("-phase")
    return short if short in experiment_names() else word


def trainings(
    name: str, row: str | None, seeds: int | None, out: Path, data_root: str | None = None, *, tune: bool = False,
    shown: bool = False,
) -> list[Run]:  # fmt: skip
    """List the trainings of a table, or of one of its rows.

    Args:
        name: of the experiment.
        row: of the table; None: all.
        seeds: how many of the paper's seeds; None: all, five for most tables and twenty for Table 11.
        out: folder of the trainings.
        data_root: folder in which to look for the data.
        tune: choose rho on a held-out tenth first, which trains.
        shown: whether the search says what it trains.

    Returns:
        The trainings.
    """
    found: list[Run] = []
    for one in experiment(name).rows if row is None else (row,):
        rho = tuned(name, one, out, data_root, shown=shown) if tune else {}
        found += [run for run in runs(name, one, out=str(out), rho=rho) if seeds is None or run.seed < seeds]
    return _with_root(found, data_root)


def beside(name: str, row: str | None, seeds: int | None, out: Path) -> list[Run]:
    """List the trainings that a single row is compared with, where these stand in another row.

    Args:
        name: of the experiment.
        row: of the table; None: all rows, which hold them already.
        seeds: as for :func:`trainings`.
        out: folder of the trainings.

    Returns:
        The trainings, which are read and never run.
    """
    other = reference_row(name)
    if row is None or row == other or other not in experiment(name).rows:
        return []
    return [run for run in runs(name, other, out=str(out)) if seeds is None or run.seed < seeds]


def tuned(name: str, row: str, out: Path, data_root: str | None = None, *, shown: bool = False) -> dict[str, float]:
    """Choose rho as the paper does: train on nine tenths with each of its six radii, and take the best on the tenth.

    Args:
        name: of the experiment.
        row: of the table.
        out: folder of the trainings.
        data_root: folder in which to look for the data.
        shown: whether a line is printed after each training.

    Returns:
        The radius by cell; nothing for a row without SAM.

    Raises:
        UserError: rho is not a choice in this table.
    """
    if name not in TUNABLE:
        raise UserError(f"--tune chooses rho in Tables {', '.join(TUNABLE)}; table {name} is about rho or fixes it")
    if not any(run.config.rho is not None for run in runs(name, row)):
        return {}
    search = _with_root(rho_search(name, row, out=str(out)), data_root)
    run_full(name, search, shown=shown)
    best: dict[str, tuple[float, float]] = {}
    for run in search:
        score, rho = held_out(result_of(run.config) or {}), run.config.rho
        assert rho is not None
        if run.cell not in best or score > best[run.cell][0]:  # of equal ones the smallest
            best[run.cell] = (score, rho)
    return {cell: rho for cell, (_, rho) in best.items()}


def run_full(name: str, wanted: Sequence[Run], *, shown: bool) -> None:
    """Train what is missing, and measure what the table has beside the error.

    A training whose loss does not stay finite is a result too, and the next one begins.

    Args:
        name: of the experiment.
        wanted: its trainings.
        shown: whether a line is printed after each training.
    """
    left = [run for run in wanted if result_of(run.config) is None]
    for number, run in enumerate(left, start=1):
        words = ""
        try:
            train(run.config)
        except TrainingError as error:
            broke_down(run.config, error)
            words = f": {error}"
        if shown:
            where = f"{run.row}, {run.cell}, {run.role}, seed {run.seed}"
            print(f"table {name}: {number} of {len(left)} trainings ({where}){words}", file=sys.stderr, flush=True)
    if name in MEASURES:
        for run in wanted:
            finished = (result_of(run.config) or {}).get("finished")
            if finished and not run.config.val_fraction and measured(MEASURES[name], run.config) is None:
                measure_trained(MEASURES[name], run.config)


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
            kept = {key: result.get(key) for key in KEPT}
            if name in MEASURES:
                kept["measured"] = measured(MEASURES[name], run.config)
            if "broken" in result:
                kept["broken"] = result["broken"]
            where = {"row": run.row, "cell": run.cell, "role": run.role, "seed": run.seed}
            lines.append({**where, "config": differences(run.config), **kept, "environment": result.get("environment")})
    write_json(path, {"table": name, "scale": "full", "trainings": lines})


def _with_root(found: Sequence[Run], data_root: str | None) -> list[Run]:
    return [replace(run, config=replace(run.config, data_root=data_root)) for run in found]
