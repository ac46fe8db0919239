"""The trainings behind a row: the paper's protocol at full size, made of the recipes.

The protocol (Foret et al., section 3 and appendix C): settings of the base optimizer for both; for SAM only rho is
chosen, on a tenth of the training images that is held out (:func:`rho_search`); the base also for twice the epochs, and
the better of its two counts; five seeds, which decide weights and order.

>>> from flatwise.lab.paper.rows import runs
>>> [(run.role, run.seed) for run in runs("1", "wrn28-10-basic", "cifar10")][::5]
[('sam', 0), ('base', 0), ('base-2x', 0)]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.paper.experiments import experiment
from flatwise.lab.paper.tables import settings
from flatwise.lab.train.config import TrainConfig

SEARCH_SEED = 100
"""Of the search for rho; no reported run has it."""


@dataclass(frozen=True)
class Run:
    """One training of an experiment.

    Attributes:
        table: the experiment.
        row: its row.
        cell: which of the row's numbers it belongs to: a data set, a noise level, a model, a radius.
        role: what it is there: "sam", "base", "base-2x" (twice the epochs), "first" (whose predictions another
            training takes as labels), or the method.
        seed: its seed.
        config: its settings.
    """

    table: str
    row: str
    cell: str
    role: str
    seed: int
    config: TrainConfig


def runs(
    table: str,
    row: str,
    cell: str | None = None,
    *,
    out: str = TrainConfig.out,
    rho: Mapping[str, float] | None = None,
) -> list[Run]:
    """List the trainings of a row, in an order in which each finds what it needs.

    Args:
        table: one of ``experiment_names()``.
        row: one of the experiment's rows.
        cell: one of its cells; None: all.
        out: folder of the runs.
        rho: a radius by cell, in the place of the paper's.

    Returns:
        The trainings, those of one role together.

    Raises:
        UnknownNameError: no such table, row or cell.
    """
    made = experiment(table)
    if row not in made.rows:
        raise UnknownNameError(f"row of table {table}", row, made.rows)
    if cell is not None and cell not in (*made.cells, *made.same_runs):
        raise UnknownNameError(f"cell of table {table}", cell, (*made.cells, *made.same_runs))
    cells = made.cells if cell is None or cell in made.same_runs else (cell,)
    found: list[Run] = []
    seen: set[TrainConfig] = set()
    for one in cells:
        roles = made.roles(row, one)
        if rho and one in rho:
            roles = {role: c if c.rho is None else replace(c, rho=rho[one]) for role, c in roles.items()}
        for role, config in roles.items():
            for seed in made.seeds:
                seeded = replace(config, seed=seed, out=out)
                if config.labels_from is not None:
                    first = replace(roles["first"], seed=seed, out=out)
                    seeded = replace(seeded, labels_from=str(Path(out) / first.folder_name()))
                if seeded not in seen:  # the base is the same for every radius
                    seen.add(seeded)
                    found.append(Run(table, row, one, role, seed, seeded))
    return found


def configs(table: str, row: str, cell: str | None = None) -> list[TrainConfig]:
    """List the settings of a row's trainings.

    Args:
        table: one of ``experiment_names()``.
        row: one of the experiment's rows.
        cell: one of its cells; None: all.

    Returns:
        Those of :func:`runs`.
    """
    return [run.config for run in runs(table, row, cell)]


def rho_search(table: str, row: str, cell: str | None = None, *, out: str = TrainConfig.out) -> list[Run]:
    """List the trainings by which the paper chooses rho: a tenth of the training images is held out.

    Args:
        table: one of ``experiment_names()``.
        row: one of the experiment's rows.
        cell: one of its cells; None: all.
        out: folder of the runs.

    Returns:
        A training for each radius of the grid, for each of the row's SAM trainings.

    Raises:
        UserError: the row has no radius to choose.
    """
    grid, held = settings()["search"]["rho"], settings()["search"]["held_out"]
    # A bootstrap takes over the radius of its first training.
    own = [
        run for run in runs(table, row, cell, out=out) if run.role in ("sam", "first") and run.config.rho is not None
    ]
    tuned = {(run.cell, run.role): run for run in own}
    if not tuned:
        raise UserError(f"table {table}, row {row} has no radius to choose")
    return [
        replace(run, seed=SEARCH_SEED, config=replace(run.config, seed=SEARCH_SEED, rho=rho, val_fraction=held))
        for run in tuned.values()
        for rho in grid
    ]
