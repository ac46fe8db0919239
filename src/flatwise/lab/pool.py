"""Runs side by side: fresh Python processes with one thread each, started and spoken to through pipes.

They are started as programs of their own, not with ``multiprocessing``, so that a comparison can be called
from a notebook or a script without the ``if __name__ == "__main__"`` that the latter asks for.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flatwise.errors import CannotWriteError, TrainingError, UserError
from flatwise.lab.config import CompareConfig
from flatwise.lab.folder import RunFolder
from flatwise.lab.tasks import Event, perform

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
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[str]] = []
        self._listeners: list[threading.Thread] = []
        self._count = workers

    def __enter__(self) -> Self:
        """Start the workers."""
        if self._count > 1:
            try:
                for number in range(self._count):
                    self._processes.append(self._start(number))
                    self._send(number, self._hello)
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
        if not self._processes:
            self._run_here(tasks)
            return
        waiting = deque(tasks)
        busy = sum(self._give(number, waiting) for number in range(len(self._processes)))
        while busy:
            number, event = self._events.get()
            if event["event"] == "error":
                raise TrainingError(event["text"])
            if event["event"] == "ended":
                code = self._processes[number].wait()
                cause = ", out of memory?" if code == -9 else ""
                raise TrainingError(
                    f"a training process ended on its own (exit code {code}{cause}; see "
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
        self._send(number, waiting.popleft())
        return 1

    def _send(self, number: int, value: object) -> None:
        pipe = self._processes[number].stdin
        assert pipe is not None
        # A worker that has ended is reported by the thread that listens to it.
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(value) + "\n")
            pipe.flush()

    def _start(self, number: int) -> subprocess.Popen[str]:
        # A worker finds the package wherever this process found it, and its libraries start one thread.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
        }
        path = self._log(number)
        try:
            log = path.open("w", encoding="utf-8")
        except OSError as error:
            raise CannotWriteError(path, error) from error
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", self._program],
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
            self._events.put((number, json.loads(line)))
        self._events.put((number, {"event": "ended"}))

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
        for listener in self._listeners:
            listener.join()
        for number, process in enumerate(self._processes):
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()
            log = self._log(number)
            if log.exists() and log.stat().st_size == 0:
                log.unlink()
        self._processes, self._listeners = [], []


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
