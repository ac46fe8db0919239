"""``flatwise reproduce``: a study at its small size, or a row of the paper at its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from flatwise.commands.flags import POSITIONAL
from flatwise.errors import UnknownNameError, UserError
from flatwise.files import make_folder
from flatwise.lab.environment import cores, describe
from flatwise.lab.paper.experiments import experiment, experiment_names
from flatwise.lab.paper.figures import draw
from flatwise.lab.paper.full import beside, paper_name, run_full, trainings, write_full
from flatwise.lab.paper.full_table import about, full_grid
from flatwise.lab.paper.layout import Grid
from flatwise.lab.paper.needs import all_needs, needs, needs_table
from flatwise.lab.paper.page import page_of
from flatwise.lab.paper.runner import Place, run_study, wall_seconds
from flatwise.lab.paper.small import STUDIES, small_study
from flatwise.lab.paper.spectra import RECORD as SPECTRA
from flatwise.lab.paper.steps import measure_step
from flatwise.lab.paper.store import Stored, write_record
from flatwise.lab.paper.study import Study

SPECTRA_NAME, ALL = "spectra", "all"
SEEDS = 5
"""Reported trainings of each method at the small size."""


@dataclass(frozen=True)
class ReproduceConfig:
    """What to reproduce, and how.

    Attributes:
        table: a study (table4, table5, table11, rho, c4, c5, m, m-noise, late-phase, msam, spectra, or all); with
            --scale full a table of the paper.
        row: only this setting of the study, as its column is called; with --scale full a row of the table.
        scale: "small" is for CPUs, with networks and data of its own; "full" is the paper's own size.
        seeds: number of reported trainings of each method (default: 5; with --scale full the paper's, 20 for Table 11).
        workers: processes that train side by side at the small size, one thread each (default: the number of cores).
        list: say what each row of the paper, or of the table, needs at full size, and train nothing.
        tune: with --scale full, choose rho on a held-out tenth, as the paper does, in place of the printed one.
        page: write docs/reproduction.md from the records, and train nothing.
        data_root: folder in which to look for the data.
        out: folder of the trainings, which all studies share.
        records: folder for the record and the picture of each study (default: in the folder of the trainings).
        quiet: no progress, only the tables.
    """

    table: str | None = field(default=None, metadata={POSITIONAL: "?"})
    row: str | None = field(default=None, metadata={POSITIONAL: "?"})
    scale: Literal["small", "full"] = "small"
    seeds: int | None = None
    workers: int | None = None
    list: bool = False
    tune: bool = False
    page: bool = False
    data_root: str | None = None
    out: str = "runs/reproduce"
    records: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            UserError: no table, or a number below 1.
            UnknownNameError: no such study.
        """
        if any(count is not None and count < 1 for count in (self.seeds, self.workers)):
            raise UserError("--seeds and --workers must be at least 1")
        if self.tune and self.scale != "full":
            raise UserError("--tune goes with --scale full; at the small size rho is chosen in any case")
        if self.table is None and not (self.list or self.page):
            raise UserError(f"name a study ({', '.join((*STUDIES, SPECTRA_NAME, ALL))}), or add --list or --page")
        if self.table is None:
            return
        if self.scale == "small" and not self.list and self.table not in (*STUDIES, SPECTRA_NAME, ALL):
            raise UnknownNameError("study", self.table, (*STUDIES, SPECTRA_NAME, ALL))
        if (self.scale == "full" or self.list) and paper_name(self.table) not in experiment_names():
            raise UnknownNameError("table of the paper", self.table, experiment_names())

    @property
    def folder(self) -> Path:
        """Where records and pictures go."""
        return Path(self.records) if self.records is not None else Path(self.out) / "records"


def studies_of(config: ReproduceConfig) -> list[Study]:
    """Say which studies are meant.

    Args:
        config: the settings.

    Returns:
        The studies, with as many seeds as asked for.
    """
    assert config.table is not None
    chosen = list(STUDIES.values()) if config.table == ALL else [small_study(config.table)]
    return [replace(study, seeds=tuple(range(config.seeds or SEEDS))) for study in chosen]


def settings_of(study: Study, row: str | None) -> list[str]:
    """Find the setting that a word means.

    Args:
        study: whose settings.
        row: the beginning of a setting's name; None: all.

    Returns:
        Names of settings.

    Raises:
        UnknownNameError: no setting's name begins so.
    """
    names = [setting.name for setting in study.settings]
    if row is None:
        return names
    found = [name for name in names if name == row] or [name for name in names if name.startswith(row)]
    if not found:
        raise UnknownNameError(f"row of {study.name}", row, names)
    return found


def reproduce(study: Study, config: ReproduceConfig) -> Stored:
    """Run a study, and leave its record and picture.

    Args:
        study: the study.
        config: the settings.

    Returns:
        The record.
    """
    workers = config.workers or cores()
    place = Place(Path(config.out), workers, shown=not config.quiet, data_root=config.data_root)
    record = run_study(study, place, settings_of(study, config.row))
    about = {
        "scale": config.scale,
        "command": f"flatwise reproduce {study.name}",
        "wall_seconds": round(wall_seconds(study, place), 1),
        "environment": describe(workers),
    }
    stored = Stored(record, about)
    make_folder(config.folder)
    write_record(config.folder / f"{study.name}.json", stored)
    draw(record, config.folder / f"{study.name}.png")
    return stored


def reproduce_full(config: ReproduceConfig) -> tuple[Grid, list[str]]:
    """Run a table of the paper, or one of its rows, at full size, and leave its record.

    Args:
        config: the settings.

    Returns:
        The table, and sentences on it.
    """
    assert config.table is not None
    name, out, shown = paper_name(config.table), Path(config.out) / "full", not config.quiet
    wanted = trainings(name, config.row, config.seeds, out, config.data_root, tune=config.tune, shown=shown)
    run_full(name, wanted, shown=not config.quiet)
    make_folder(config.folder)
    write_full(config.folder / f"full-{name}.json", name, wanted)
    return full_grid(name, wanted, beside(name, config.row, config.seeds, out)), about(name)


def listing(config: ReproduceConfig) -> str:
    """Say what rows of the paper need at full size.

    A step is timed where there is a GPU, and on the CPU where a table is named.

    Args:
        config: its ``table`` and ``row`` are read.

    Returns:
        A table.
    """
    measure = measure_step if torch.cuda.is_available() or config.table is not None else None
    if config.table is None:
        return needs_table(all_needs(measure))
    name = paper_name(config.table)
    rows = experiment(name).rows if config.row is None else (config.row,)
    return needs_table([needs(name, row, measure=measure) for row in rows])


def write_page(config: ReproduceConfig) -> Path:
    """Write the page from the records in the docs of a checkout.

    Args:
        config: its ``records`` is read.

    Returns:
        The page.

    Raises:
        UserError: there is no docs folder here.
    """
    docs = Path("docs")
    if not docs.is_dir():
        raise UserError("--page writes docs/reproduction.md of a checkout of flatwise: go to its folder")
    records = docs / "results" / "reproduction" if config.records is None else Path(config.records)
    path = docs / "reproduction.md"
    path.write_text(page_of(records, SPECTRA), encoding="utf-8")
    return path
