"""Running a study: what has finished is read, what is missing is trained side by side; it may be stopped anywhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from flatwise.files import make_folder, read_json, write_json
from flatwise.lab.child import Event
from flatwise.lab.paper.measures import measured
from flatwise.lab.paper.protocol import Finished, Run, plan
from flatwise.lab.paper.record import Line, Record, line_of
from flatwise.lab.paper.study import Study
from flatwise.lab.paper.tasks import measurement, perform, result_of, training
from flatwise.lab.pool import Task, Workers
from flatwise.lab.train.config import TrainConfig
from flatwise.measure.progress import Bar


@dataclass(frozen=True)
class Place:
    """Where a study runs.

    Attributes:
        out: folder of everything that it leaves.
        workers: trainings side by side.
        shown: whether progress is shown.
        data_root: folder in which to look for the data.
    """

    out: Path
    workers: int
    shown: bool
    data_root: str | None = None

    @property
    def trainings(self) -> Path:
        """The folder with one folder a training, which all studies share."""
        return self.out / "trainings"

    def plan(self, study: Study, finished: Finished, names: Sequence[str]) -> list[Run]:
        """List the trainings of a study here.

        Args:
            study: the study.
            finished: gives the result of a training.
            names: settings; none: all.

        Returns:
            The trainings, as far as they can be told.
        """
        return plan(study, finished, self.trainings, names, data_root=self.data_root)

    def log(self, worker: int) -> Path:
        """Name a worker's log.

        Args:
            worker: its number.

        Returns:
            The file.
        """
        return self.out / f"worker-{worker}.log"

    def clock(self, study: Study) -> Path:
        """Name the file that says how long a study has run, over all its interruptions.

        Args:
            study: which.

        Returns:
            The file.
        """
        return self.out / f"wall-{study.name}.json"


def run_study(study: Study, place: Place, names: Sequence[str] = ()) -> Record:
    """Train and measure what a study still lacks.

    Args:
        study: the study.
        place: where.
        names: settings to run; none: all.

    Returns:
        The record of all its trainings.
    """
    make_folder(place.trainings)
    with _Left(study, place, names) as left:
        while True:
            runs = place.plan(study, result_of, names)
            tasks: list[Task] = [training(config) for config in _missing(runs)]
            if not tasks and study.measure is not None:
                tasks = [measurement(study.measure, config) for config in _unmeasured(study, runs)]
            if not tasks:
                return record_of(study, runs)
            begun = time.monotonic()
            try:
                workers = min(place.workers, len(tasks))
                with Workers("flatwise.lab.paper.worker", {}, perform, place.log, workers, left) as pool:
                    pool.run(tasks)
            finally:
                write_json(place.clock(study), {"seconds": wall_seconds(study, place) + time.monotonic() - begun})


def wall_seconds(study: Study, place: Place) -> float:
    """Say how long a study has run, over all its interruptions; trainings that another study made do not count.

    Args:
        study: which.
        place: where.

    Returns:
        Seconds.
    """
    return float((read_json(place.clock(study)) or {}).get("seconds", 0.0))


def collect(study: Study, place: Place, names: Sequence[str] = ()) -> Record:
    """Read what a study has, without training.

    Args:
        study: the study.
        place: where.
        names: settings; none: all.

    Returns:
        The record of the trainings that have finished.
    """
    return record_of(study, place.plan(study, result_of, names))


def record_of(study: Study, runs: Sequence[Run]) -> Record:
    """Make the record of the trainings that have finished.

    Args:
        study: what they are for.
        runs: the plan.

    Returns:
        The record.
    """
    lines: list[Line] = []
    for run in runs:
        result = result_of(run.config)
        if result is not None:
            values = None if study.measure is None or run.stage == "tuning" else measured(study.measure, run.config)
            lines.append(line_of(run, result, values))
    return Record(study, lines, study.seeds)


def _missing(runs: Sequence[Run]) -> list[TrainConfig]:
    # Two arms may be the same training, and the dear ones go first: else one of them runs alone at the end.
    configs = {run.config.folder_name(): run.config for run in runs if result_of(run.config) is None}
    return sorted(configs.values(), key=lambda config: -work(config))


def _unmeasured(study: Study, runs: Sequence[Run]) -> list[TrainConfig]:
    assert study.measure is not None
    return [run.config for run in runs if run.stage != "tuning" and measured(study.measure, run.config) is None]


def work(config: TrainConfig) -> float:
    """Guess the work of a training, for the order of the runs and the time left only.

    Args:
        config: the training.

    Returns:
        Images whose gradient is computed, in thousands.
    """
    name, _, options = config.method.partition(":")
    passes = {"base": 1.0, "msam": 1.0, "random": 1.0, "second-order": 4.0}.get(name, 2.0)
    steps = re.search(r"ascent_steps=(\d+)", options)
    window = re.search(r"window=\(([\d.]+),([\d.]+)\)", options.replace(" ", ""))
    if steps:
        passes = 1.0 + int(steps[1])
    if window:
        passes = 1.0 + float(window[2]) - float(window[1])
    m = config.m
    if m is not None and m < config.batch_size:
        passes *= 1 + 7 / m  # small passes waste most of their time
    return passes * config.epochs * (config.train_size or 60_000) / 1000


class _Left:
    """Says how far a study is: a bar on a terminal, a line after each training elsewhere."""

    def __init__(self, study: Study, place: Place, names: Sequence[str]) -> None:
        self._study, self._shown = study, place.shown
        # As if everything had finished alike: the choices that are still open change no number of trainings.
        everything = place.plan(study, lambda config: {"validation_accuracy": 0.0}, names)
        works = {run.config.folder_name(): work(run.config) for run in everything}
        self._total, self._count = sum(works.values()), len(works)
        known = [run.config for run in place.plan(study, result_of, names) if result_of(run.config)]
        done = {config.folder_name(): work(config) for config in known}
        self._done, self._before, self._finished = sum(done.values()), sum(done.values()), len(done)
        self._begun = time.monotonic()
        self._bar = Bar(study.name, self._total, shown=place.shown)
        self._bar.advance(self._done)

    def __enter__(self) -> _Left:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def __call__(self, event: Event) -> None:
        if event["event"] != "done" or "measure" in event["task"]:
            return
        amount = work(TrainConfig(**event["task"]["config"]))
        self._done, self._finished = self._done + amount, self._finished + 1
        self._bar.advance(amount)
        if self._shown and not sys.stderr.isatty():
            rate = (time.monotonic() - self._begun) / (self._done - self._before)
            minutes = rate * max(0.0, self._total - self._done) / 60
            print(f"{self._study.name}: {self._finished} of {self._count} trainings, about {minutes:.0f} min left",
                  file=sys.stderr, flush=True)  # fmt: skip


__all__ = ["Place", "collect", "record_of", "run_study", "work"]
