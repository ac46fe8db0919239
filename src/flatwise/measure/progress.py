"""A bar on standard error for what takes longer than two seconds, where somebody is looking."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

PATIENCE = 2.0
"""Seconds before anything is shown."""


class Drawn:
    """What draws while a block runs, where ``_progress`` is not None, and leaves the terminal as it was."""

    _progress: Progress | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


class Bar(Drawn):
    """Shows how much is done and how much time is left. Without rich, or off a terminal, it shows nothing.

    Args:
        label: what is being done.
        total: how many units of work there are.
        shown: False never shows anything.
    """

    def __init__(self, label: str, total: float, *, shown: bool = True) -> None:
        self._label, self._total, self._done = label, total, 0.0
        self._shown = shown and sys.stderr.isatty()
        self._start = time.monotonic()
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        """Begin."""
        return self

    def advance(self, amount: float = 1.0, *, total: float | None = None) -> None:
        """Say that work was done.

        Args:
            amount: units of it.
            total: the number of units, where it turned out to be another one.
        """
        self._done += amount
        self._total = self._total if total is None else total
        if self._progress is None and self._shown and time.monotonic() - self._start > PATIENCE:
            self._begin()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, total=self._total)

    def _begin(self) -> None:
        try:
            self._progress = bars()
        except ImportError:
            self._shown = False
            return
        self._task = self._progress.add_task(self._label, total=self._total, completed=int(self._done))
        self._progress.start()


def bars(*more: ProgressColumn) -> Progress:
    """Make bars on standard error that leave nothing on the screen.

    Args:
        *more: columns between the bar and the time.

    Returns:
        Bars without a task.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), *more, TimeElapsedColumn(), TextColumn("left"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
