"""Runs side by side: a process each with one thread, or this process where one is enough."""

from __future__ import annotations

import queue
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flatwise.errors import TrainingError, UserError
from flatwise.lab.child import Child, Event, Events, cause_of
from flatwise.lab.config import CompareConfig
from flatwise.lab.folder import RunFolder
from flatwise.lab.tasks import perform

if TYPE_CHECKING:
    from typing_extensions import Self


Task = int | str | dict[str, Any]


class Workers:
    """Some workers, or this process itself where one is enough.

    Use it as a context: on leaving, also by an error or Ctrl-C, every worker has ended.

    Args:
        program: the module that a worker runs; it serves as :func:`flatwise.lab.worker.serve` does.
        hello: what every worker is told first.
        perform: does a task in this process.
        log: where a worker's log goes, by its number.
        workers: how many; with 1, the tasks run in this process.
        on_event: takes the events ``epoch``, ``notice`` and ``done`` of all tasks.
    """

    def __init__(
        self,
        program: str,
        hello: object,
        perform: Callable[[Task, Callable[[Event], None]], object],
        log: Callable[[int], Path],
        workers: int,
        on_event: Callable[[Event], None],
    ) -> None:
        self._program, self._hello, self._perform, self._log = program, hello, perform, log
        self._on_event = on_event
        self._events: Events = queue.SimpleQueue()
        self._children: list[Child] = []
        self._count = workers

    def __enter__(self) -> Self:
        """Start the workers."""
        if self._count > 1:
            try:
                for number in range(self._count):
                    self._children.append(Child(self._program, number, self._log(number), self._events))
                    self._children[number].send(self._hello)
            except BaseException:
                self._stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers, whatever they are doing: what they wrote is whole."""
        self._stop()

    def run(self, tasks: Sequence[Task]) -> None:
        """Do tasks and wait for all of them.

        Args:
            tasks: what JSON can hold; they are begun in this order.

        Raises:
            TrainingError: a task failed, or a worker ended on its own.
        """
        if not self._children:
            self._run_here(tasks)
            return
        waiting = deque(tasks)
        busy = sum(self._give(number, waiting) for number in range(len(self._children)))
        while busy:
            number, event = self._events.get()
            if event["event"] == "error":
                raise TrainingError(event["text"])
            if event["event"] == "ended":
                raise TrainingError(
                    f"a training process ended on its own ({cause_of(self._children[number].close())}; see "
                    f"{self._log(number)}); the same command continues from the last epoch"
                )
            if event["event"] == "done":
                busy += self._give(number, waiting) - 1
            self._on_event(event)

    def _run_here(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            try:
                self._perform(task, self._on_event)
            except UserError:
                raise
            except Exception as error:  # one line for the user, as from a worker; the rest is in the log
                self._log(0).write_text(traceback.format_exc(), encoding="utf-8")
                raise TrainingError(f"{type(error).__name__}: {error}") from error
            self._on_event({"event": "done", "task": task})

    def _give(self, number: int, waiting: deque[Task]) -> int:
        if not waiting:
            return 0
        self._children[number].send(waiting.popleft())
        return 1

    def _stop(self) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.close()
        self._children = []


class Pool(Workers):
    """The workers of a comparison.

    Args:
        config: the settings, which every worker gets.
        folder: the run folder.
        workers: how many; with 1, the tasks run in this process.
        on_event: takes the events ``epoch``, ``notice`` and ``done`` of all tasks.
    """

    def __init__(
        self, config: CompareConfig, folder: RunFolder, workers: int, on_event: Callable[[Event], None]
    ) -> None:
        def here(task: Task, send: Callable[[Event], None]) -> None:
            assert not isinstance(task, dict)
            perform(config, folder, task, send)

        hello = {"config": asdict(config), "folder": str(folder.path)}
        super().__init__("flatwise.lab.worker", hello, here, folder.worker_log, workers, on_event)
