"""What a sweep is: what is searched and how, and the settings that all its trainings share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from flatwise.errors import UserError
from flatwise.lab.config import flag
from flatwise.lab.sweep.space import Space, read_space
from flatwise.lab.train.config import NOT_PART_OF_THE_RESULT, TrainConfig

SET_BY_TRIAL = frozenset({"method", "rho", "lr", "weight_decay", "seed", "out", "fresh", "quiet"})
"""Fields of a training that the sweep sets itself; all others are fixed for all trials."""
DEFAULTS = {"val_fraction": 0.1, "tracker": "none"}
"""Fixed settings whose default differs from that of one training: trials need a held-out part, and are many."""


@dataclass(frozen=True)
class SweepConfig:
    """The settings of one sweep.

    Attributes:
        methods: methods to choose from, separated by commas; "base" is no SAM. One with a radius of its own, as in
            sam:rho=0.1, keeps it.
        rho: radii of SAM, as low:high, low:high:log, one number, or several with commas. Other methods search the same
            times the ratio of their default radius to SAM's. asam=0.1:5:log, after a comma, gives a method its own.
        lr: learning rates, written alike.
        weight_decay: weight decays, written alike.
        trials: how many settings are tried, over all machines, those stopped early included.
        minutes: after this time, no trial is begun; those that run are finished.
        seeds: trainings of each trial, whose mean counts.
        seed: of the search, and the first of the trainings'.
        sampler: how settings are chosen: "tpe" learns from earlier trials, "random" does not.
        pruner: how trials are stopped early, by the validation accuracy so far: below the "median" of the others,
            "hyperband", or "none".
        workers: trainings side by side on this machine, one thread each; 1 trains in this process with all threads.
        study: name of the study and of its folder (default: data set and model).
        storage: URL of a database that machines share, such as postgresql://user@host/name (default: a file in the
            study's folder).
        out: folder in which the study's folder is made.
        fresh: forget the study and begin again.
        quiet: no progress, only the table.
        fixed: the fields of every training that are not searched.
    """

    methods: str = "sam,asam"
    rho: str = "0.01:1:log"
    lr: str = "0.01:0.3:log"
    weight_decay: str = "0.00001:0.005:log"
    trials: int = 50
    minutes: float | None = None
    seeds: int = 1
    seed: int = 0
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    workers: int = 1
    study: str | None = None
    storage: str | None = field(default=None, repr=False)  # it may hold a password
    out: str = "runs/sweep"
    fresh: bool = False
    quiet: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            UserError: a number outside its range, no held-out part, or two settings that exclude each other.
        """
        for name in ("trials", "seeds", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} must be at least 1, not {getattr(self, name)}")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise UserError(f"--minutes must be a number above 0, not {self.minutes}")
        if self.fresh and self.storage is not None:
            raise UserError("--fresh would delete a study that others may share: name another one with --study")
        if any(mark in self.name for mark in "/\\") or self.name in ("", ".", ".."):
            raise UserError(f"--study must be a plain name, not {self.name!r}")
        for name in SET_BY_TRIAL & set(self.fixed):
            raise UserError(f"{name} is set by the sweep, so it cannot be among the fixed settings")
        if self.training.val_fraction <= 0:
            raise UserError("a sweep chooses by held-out images: --val-fraction must be above 0, as in 0.1")
        self.space  # noqa: B018  -- it is read, and refuses what it cannot understand

    @property
    def training(self) -> TrainConfig:
        """The settings that all trainings share; method, radius, rate and decay in it are not used."""
        return TrainConfig(**{**DEFAULTS, **self.fixed})

    @property
    def space(self) -> Space:
        """What is searched."""
        return read_space(self.methods, rho=self.rho, lr=self.lr, weight_decay=self.weight_decay)

    @property
    def name(self) -> str:
        """The study's name."""
        training = self.training
        return (
            f"{training.dataset.rstrip('/').rpartition('/')[2]}-{training.model}" if self.study is None else self.study
        )

    def settings(self) -> dict[str, Any]:
        """Say what the trials' numbers depend on, which may not change within one study.

        Returns:
            Values by the name of their flag.
        """
        kept = {
            name: value
            for name, value in asdict(self.training).items()
            if name not in SET_BY_TRIAL | NOT_PART_OF_THE_RESULT
        }
        own = {name: getattr(self, name) for name in ("seeds", "seed", "sampler", "pruner")}
        return {**kept, **own, **self.space.written()}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say in which settings two sweeps differ.

    Args:
        there: the settings of the study that exists.
        here: those of the command.

    Returns:
        A phrase for each difference.
    """
    # A setting that a later version added had its default before.
    defaults = {entry.name: DEFAULTS.get(entry.name, entry.default) for entry in fields(TrainConfig)}
    names = dict.fromkeys([*here, *there])
    values = {name: [side.get(name, defaults.get(name)) for side in (there, here)] for name in names}
    return [f"{flag(name)} is {old} there, {new} here" for name, (old, new) in values.items() if old != new]
