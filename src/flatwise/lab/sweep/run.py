"""A sweep from its first trial, or from where an earlier call ended, to its files."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatwise.errors import UserError
from flatwise.files import make_folder, write_json
from flatwise.lab.lock import locked
from flatwise.lab.sweep.config import SweepConfig
from flatwise.lab.sweep.crew import Crew, run_here
from flatwise.lab.sweep.picture import draw
from flatwise.lab.sweep.progress import Bars
from flatwise.lab.sweep.results import Row, finished, results_of, rows_of
from flatwise.lab.sweep.search import Search
from flatwise.lab.sweep.storage import Heart, answering
from flatwise.lab.sweep.study import JOURNAL, open_study, quiet_optuna


@dataclass(frozen=True)
class Sweep:
    """What a sweep leaves.

    Attributes:
        folder: with ``results.json``, ``sweep.png`` and the trials.
        rows: the finished trials, the best first, then those that were stopped.
        results: the content of ``results.json``.
    """

    folder: Path
    rows: list[Row]
    results: dict[str, Any]


def sweep(config: SweepConfig) -> Sweep:
    """Search, or go on with the same search, until the budget is used up.

    Args:
        config: the settings.

    Returns:
        What was found, over all calls and machines so far.

    Raises:
        UserError: it was started with torchrun.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a sweep trains each trial in one process: start it without torchrun, and see --workers")
    folder = Path(config.out) / config.name
    make_folder(folder)
    with quiet_optuna(), locked(folder), answering(config.storage):
        if config.fresh or (config.storage is None and not (folder / JOURNAL).exists()):
            _clear(folder)  # trials of a study that is gone are nobody's
        opened = open_study(config, folder)
        try:
            with (
                Bars(config, opened.study) as bars,
                Heart(opened.shared) as heart,
                Search(config, opened, folder, heart, bars) as search,
            ):
                if config.workers == 1:
                    run_here(search)
                else:
                    with Crew(config.workers, folder) as crew:
                        crew.run(search)
        finally:
            # Also after Ctrl-C: what is known so far is there to be read.
            rows = rows_of(opened.study)
            results = results_of(config, rows)
            write_json(folder / "results.json", results)
            if rows:
                draw(rows, folder / "sweep.png", title=_title(config), subtitle=_subtitle(config, rows))
    return Sweep(folder, rows, results)


def _clear(folder: Path) -> None:
    """Remove what a sweep wrote, and nothing else."""
    shutil.rmtree(folder / "trials", ignore_errors=True)
    for name in (JOURNAL, f"{JOURNAL}.lock", "results.json", "sweep.png"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("worker-*.log"):
        path.unlink(missing_ok=True)


def _title(config: SweepConfig) -> str:
    training = config.training
    noise = f", {100 * training.label_noise:g} % wrong labels" if training.label_noise else ""
    length = f"{training.epochs} epochs" if training.steps is None else f"{training.steps} steps"
    return f"{training.model} on {training.dataset.rstrip('/').rpartition('/')[2]}{noise}, {length}"


def _subtitle(config: SweepConfig, rows: list[Row]) -> str:
    ended, seeds = len(finished(rows)), config.seeds
    spread = "one seed each" if seeds == 1 else f"mean and 95 % interval over {seeds} seeds"
    return f"{ended} trials trained to the end, {spread}; {len(rows) - ended} stopped early"
