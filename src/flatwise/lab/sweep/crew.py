"""Trials side by side: a process each with one thread, or this process where one is enough."""

from __future__ import annotations

import queue
from pathlib import Path
from types import TracebackType
from typing import Protocol

from flatwise.errors import TrainingError, UserError
from flatwise.lab.child import Child, Event, Events, cause_of
from flatwise.lab.sweep.perform import Task, perform

PROGRAM = "flatwise.lab.sweep.worker"


class Answers(Protocol):
    """Who hands out trials and hears of them."""

    def next_task(self) -> Task | None:
        """Begin a trial; None where none is left to begin."""

    def hear(self, event: Event) -> bool:
        """Take an event; True, for an epoch, stops the trial."""

    def lost(self, number: int, cause: str) -> None:
        """Take it that a trial's process has ended."""


def run_here(answers: Answers) -> None:
    """Do all trials in this process.

    Args:
        answers: hands out the trials and hears of them.

    """
    while (task := answers.next_task()) is not None:
        _perform(task, answers)


def _perform(task: Task, answers: Answers) -> None:
    try:
        perform(task, answers.hear)
    except UserError:
        raise
    except Exception as error:  # one line for the user, as from a worker
        raise TrainingError(f"trial {task['trial']}: {type(error).__name__}: {error}") from error


class Crew:
    """Some workers. Use it as a context: on leaving, also by an error or Ctrl-C, every worker has ended.

    Args:
        workers: how many.
        folder: takes what they print; a log that stays empty is removed.
    """

    def __init__(self, workers: int, folder: Path) -> None:
        self._count, self._folder = workers, folder
        self._events: Events = queue.SimpleQueue()
        self._children: dict[int, Child] = {}
        self._tasks: dict[int, Task] = {}

    def __enter__(self) -> Crew:
        """Start nothing yet: a worker starts with its first trial."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers, whatever they are doing: what they wrote is whole."""
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            child.close()

    def run(self, answers: Answers) -> None:
        """Do all trials.

        Args:
            answers: hands out the trials and hears of them.

        Raises:
            TrainingError: a training failed.
        """
        self._fill(answers)
        while self._tasks:
            number, event = self._events.get()
            task = self._tasks.get(number)
            if event["event"] == "ended":
                cause = cause_of(self._children.pop(number).close())
                if task is not None:
                    del self._tasks[number]
                    answers.lost(task["trial"], f"{cause}; see {self._log(number)}")
            elif event["event"] == "error":
                raise TrainingError(f"trial {event['trial']}: {event['text']}")
            else:
                stop = answers.hear(event)
                if event["event"] == "epoch":
                    self._children[number].send("stop" if stop else "go")
                elif event["event"] in ("done", "stopped", "failed"):
                    del self._tasks[number]
            self._fill(answers)

    def _fill(self, answers: Answers) -> None:
        for number in range(self._count):
            if number not in self._tasks:
                task = answers.next_task()
                if task is None:
                    return
                if number not in self._children:
                    self._children[number] = Child(PROGRAM, number, self._log(number), self._events, append=True)
                self._tasks[number] = task
                self._children[number].send(task)

    def _log(self, number: int) -> Path:
        return self._folder / f"worker-{number}.log"
