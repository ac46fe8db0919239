"""What a long run says on standard error: how long it will take, and a bar where somebody is looking."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

PATIENCE = 2.0
"""Seconds before a bar is shown."""

WORTH_SAYING = 5.0
"""Seconds above which an estimate is."""


def announce(what: str, unit: str, seconds: float, usual: float, most: float) -> None:
    """Say how long it will take, where that is more than a few seconds.

    Args:
        what: is measured.
        unit: of the work.
        seconds: that one takes.
        usual: a usual number of them.
        most: the largest number.
    """
    if usual * seconds > WORTH_SAYING:
        upper = "" if most <= usual else f", at most {most:.0f} ({most * seconds:.0f} s)"
        needed = f"about {usual:.0f} are needed ({usual * seconds:.0f} s){upper}"
        sys.stderr.write(f"{what}: {unit} takes {seconds:.2g} s; {needed}\n")


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

    A bar inside another stands in its place while it is there: two displays would write over one another, and the
    outer one's time left would be that of a step it does not take.

    Args:
        label: what is being done.
        total: how many units of work there are.
        shown: False never shows anything.
    """

    _screen: ClassVar[list[Bar]] = []
    """The bars that are on the screen, the innermost last."""

    def __init__(self, label: str, total: float, *, shown: bool = True) -> None:
        self._label, self._total, self._done = label, total, 0.0
        self._shown = shown and sys.stderr.isatty()
        self._start = time.monotonic()
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        if self._progress is None or self._task is None:
            return
        self._screen.remove(self)
        self._progress.remove_task(self._task)
        if self._screen:
            self._screen[-1]._show(True)
        else:
            self._progress.stop()

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
        if self._screen:
            self._progress = self._screen[-1]._progress
            self._screen[-1]._show(False)
        else:
            try:
                self._progress = bars()
            except ImportError:
                self._shown = False
                return
            self._progress.start()
        assert self._progress is not None
        self._screen.append(self)
        self._task = self._progress.add_task(self._label, total=self._total, completed=int(self._done))

    def _show(self, visible: bool) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, visible=visible)


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


def spoken(seconds: float) -> str:
    """Write a time as one says it.

    Args:
        seconds: how long.

    Returns:
        Such as ``"40 s"``, ``"6 min"`` or ``"1 h 20 min"``.
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
