"""Trials side by side: a process each with one thread, or this process where one is enough."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol

from flatwise.errors import CannotWriteError, TrainingError, UserError
from flatwise.lab.sweep.perform import Event, Task, perform


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
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._listeners: list[threading.Thread] = []
        self._tasks: dict[int, Task] = {}

    def __enter__(self) -> Crew:
        """Start nothing yet: a worker starts with its first trial."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers, whatever they are doing: what they wrote is whole."""
        for process in self._processes.values():
            process.kill()
        for listener in self._listeners:
            listener.join()
        for number in list(self._processes):
            self._close(number)

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
                code = self._close(number)
                if task is not None:
                    del self._tasks[number]
                    cause = ", out of memory?" if code == -9 else ""
                    answers.lost(task["trial"], f"exit code {code}{cause}; see {self._log(number)}")
            elif event["event"] == "error":
                raise TrainingError(f"trial {event['trial']}: {event['text']}")
            else:
                stop = answers.hear(event)
                if event["event"] == "epoch":
                    self._send(number, "stop" if stop else "go")
                elif event["event"] in ("done", "stopped", "failed"):
                    del self._tasks[number]
            self._fill(answers)

    def _fill(self, answers: Answers) -> None:
        for number in range(self._count):
            if number not in self._tasks:
                task = answers.next_task()
                if task is None:
                    return
                if number not in self._processes:
                    self._processes[number] = self._start(number)
                self._tasks[number] = task
                self._send(number, task)

    def _send(self, number: int, value: object) -> None:
        pipe = self._processes[number].stdin
        assert pipe is not None
        # A worker that has ended is reported by the thread that listens to it.
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(value) + "\n")
            pipe.flush()

    def _log(self, number: int) -> Path:
        return self._folder / f"worker-{number}.log"

    def _start(self, number: int) -> subprocess.Popen[str]:
        # A worker finds the package wherever this process found it, and its libraries start one thread.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        path = self._log(number)
        try:
            log = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CannotWriteError(path, error) from error
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flatwise.lab.sweep.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                encoding="utf-8",
                # Ctrl-C is for this process, which then ends the workers in order.
                start_new_session=True,
            )
        listener = threading.Thread(target=self._listen, args=(number, process), daemon=True)
        listener.start()
        self._listeners.append(listener)
        return process

    def _listen(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # half a line, of a worker that was killed
                self._events.put((number, json.loads(line)))
        self._events.put((number, {"event": "ended"}))

    def _close(self, number: int) -> int:
        process = self._processes.pop(number)
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        log = self._log(number)
        if log.exists() and log.stat().st_size == 0:
            log.unlink()
        return code
