"""A fresh Python process with one thread, spoken to through pipes in lines of JSON.

It is started as a program of its own, not with ``multiprocessing``, so that a comparison can be called from a notebook
or a script without the ``if __name__ == "__main__"`` that the latter asks for. What it runs serves as
:func:`flatwise.lab.worker.serve` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from flatwise.errors import CannotWriteError

Event = dict[str, Any]
Events = queue.SimpleQueue[tuple[int, Event]]
"""Takes what children say, each event with the child's number; the last one of each is ``ended``."""


class Child:
    """A process, from its start to its end.

    Args:
        program: the module that it runs.
        number: its own among the children.
        log: takes what it prints; one that stays empty is removed.
        events: takes its events.
        append: go on with the log that is there, which is of the process whose place it takes.

    Raises:
        CannotWriteError: the log cannot be written.
    """

    def __init__(self, program: str, number: int, log: Path, events: Events, *, append: bool = False) -> None:
        # It finds the package wherever this process found it, and its libraries start one thread.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self._number, self._log, self._events = number, log, events
        try:
            file = log.open("a" if append else "w", encoding="utf-8")
        except OSError as error:
            raise CannotWriteError(log, error) from error
        with file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
                encoding="utf-8",
                # Ctrl-C is for this process, which then ends its children in order.
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """The number that the system gave it."""
        return self._process.pid

    def send(self, value: object) -> None:
        """Tell it something; one that has ended is reported by its last event.

        Args:
            value: what JSON can hold.
        """
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(value) + "\n")
            pipe.flush()

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()

    def close(self) -> int:
        """Wait for its end, and clear away what is left of it.

        Returns:
            Its exit code.
        """
        code = self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(OSError):
            if self._log.stat().st_size == 0:
                self._log.unlink()
        return code

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # half a line, of a process that was killed
                self._events.put((self._number, json.loads(line)))
        self._events.put((self._number, {"event": "ended"}))


def cause_of(code: int) -> str:
    """Say how a process ended that was not to end.

    Args:
        code: its exit code.

    Returns:
        Such as ``"exit code -9, out of memory?"``.
    """
    return f"exit code {code}{', out of memory?' if code == -9 else ''}"
