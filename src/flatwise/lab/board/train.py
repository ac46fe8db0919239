"""Train what the store does not hold yet, and say how long that will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flatwise.errors import UserError
from flatwise.files import read_json
from flatwise.lab.board.plan import BASE, LONGER, Entry, Task, config_for, entries
from flatwise.lab.board.store import Store
from flatwise.lab.environment import describe
from flatwise.lab.folder import RunFolder
from flatwise.lab.job import all_jobs
from flatwise.lab.methods import Method
from flatwise.lab.pool import Pool
from flatwise.lab.tasks import one_thread
from flatwise.lab.timing import time_methods

TIMING_SECONDS = 60.0
SAY_EVERY = 30.0
Result = dict[str, Any]


class Left:
    """Says how much is done and how long the rest will take, on standard error.

    Args:
        seconds: what each training that is still to be done is expected to take.
        workers: how many run side by side.
    """

    def __init__(self, seconds: Sequence[float], workers: int) -> None:
        self._whole, self._count = sum(seconds), len(seconds)
        self._workers = workers
        self._done, self._trainings = 0.0, 0
        self._begun = self._said = time.monotonic()

    def advance(self, seconds: float) -> None:
        """Count a finished training.

        Args:
            seconds: what it was expected to take.
        """
        self._done += seconds
        self._trainings += 1
        now = time.monotonic()
        if sys.stderr.isatty() or now - self._said >= SAY_EVERY or self._trainings == self._count:
            self._said = now
            self.say()

    def say(self) -> None:
        """Write the line."""
        passed = time.monotonic() - self._begun
        # Other work on the machine slows everything: the pace so far says more than the timing, once there is one.
        pace = passed / self._done if self._trainings >= self._workers else 1 / self._workers
        minutes = (self._whole - self._done) * pace / 60
        end = "\r" if sys.stderr.isatty() and self._trainings < self._count else "\n"
        print(f"{self._trainings} of {self._count} trainings, about {minutes:.0f} min left  ", end=end, file=sys.stderr)


def time_task(task: Task, methods: Sequence[str], store: Store) -> None:
    """Time a step of every method that has not been timed on a task.

    Args:
        task: the task.
        methods: names.
        store: takes the ratios.
    """
    known = store.timing(task)
    missing = [name for name in methods if name not in known and name not in (BASE, LONGER)]
    if not missing and BASE in known:
        return
    print(f"{task.name}: timing a step of {len(missing)} methods, about a minute", file=sys.stderr)
    chosen = [Entry(BASE, BASE, None), *(entries(task, name)[1] for name in missing)]
    with one_thread():
        timing = time_methods(config_for(task, chosen, 1), TIMING_SECONDS)
    for entry in chosen:
        known.setdefault(entry.method, {**timing["methods"][entry.text], "rounds": timing["rounds"]})
    content = {"how": "steps interleaved in one process, one thread, medians of the ratios to the base's step"}
    store.write(task, "timing", {"task": task.name, **content, "environment": describe(1), "methods": known})


def train(
    tasks: Sequence[Task], methods: Sequence[str], seeds: int, store: Store, runs: Path, workers: int, *, fresh: bool
) -> None:
    """Train every method at every radius from every seed, but for what the store holds.

    Args:
        tasks: the tasks, in this order.
        methods: names; the base, against which all are compared, is trained in any case.
        seeds: how many seeds, from 0.
        store: takes the finished trainings, each at once.
        runs: folder for what is not finished yet.
        workers: processes side by side.
        fresh: train again what the store holds.
    """
    wanted = list(dict.fromkeys([BASE, *methods]))
    for task in tasks:
        time_task(task, wanted, store)
    plans = [_Plan(task, wanted, seeds, store, fresh) for task in tasks]
    left = Left([plan.expected[number] for plan in plans for number in plan.pending], workers)
    if left._count:
        left.say()
    for plan in plans:
        if not plan.pending:
            continue
        folder = RunFolder(runs / plan.config.folder_name())
        with folder.locked():
            if fresh:
                folder.clear()
                folder.create()

            def keep(event: Result, plan: _Plan = plan, folder: RunFolder = folder) -> None:
                if event["event"] != "done":
                    return
                entry, seed = plan.places[event["task"]]
                result = read_json(folder.job(entry.text, seed))
                if result is None:
                    raise UserError(f"the training {entry.text}, seed {seed}, left no result in {folder.path}")
                store.add(plan.task, entry, result, f"torch-{torch.__version__}")
                left.advance(plan.expected[event["task"]])

            with Pool(plan.config, folder, min(workers, len(plan.pending)), keep) as pool:
                pool.run(plan.pending)


class _Plan:
    """What a task still needs, as numbers in the list of all runs of its settings."""

    def __init__(self, task: Task, methods: Sequence[str], seeds: int, store: Store, fresh: bool) -> None:
        self.task = task
        rows = [entry for name in methods for entry in entries(task, name)]
        self.config = config_for(task, rows, seeds)
        by_text = {entry.text: entry for entry in rows}
        jobs = all_jobs(self.config)
        self.places = {number: (by_text[job.method.name], job.seed) for number, job in enumerate(jobs)}
        done = {entry.text: set() if fresh else set(store.runs(task, entry)) for entry in rows}
        order = {entry.text: number for number, entry in enumerate(rows)}
        # Method by method: a board that is stopped early has whole rows.
        self.pending = sorted(
            (number for number, (entry, seed) in self.places.items() if seed not in done[entry.text]),
            key=lambda number: (order[self.places[number][0].text], self.places[number][1]),
        )
        timing = store.timing(task)
        self.expected = {
            number: _seconds(job.method, self.places[number][0], timing, task) for number, job in enumerate(jobs)
        }


def _seconds(method: Method, entry: Entry, timing: Result, task: Task) -> float:
    share = timing[entry.method if entry.method in timing else BASE]["step_seconds"]
    size = (task.config.train_size or 1438) * (1 - task.config.val_fraction)
    return float(share * method.longer * task.config.epochs * size / task.config.batch_size)
