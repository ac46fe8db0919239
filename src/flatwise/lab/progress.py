"""What is shown while runs train: bars with the time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flatwise.measure.progress import Drawn, bars

if TYPE_CHECKING:
    from rich.progress import TaskID


class Bars(Drawn):
    """One bar for each method and one for the whole, on standard error.

    Args:
        plan: for each method its name and how many epochs all its runs have together.
        owners: the method of each run, by the run's number.
        weights: what an epoch of each method costs, relative to the base.
        shown: whether to show anything but notices; off a terminal nothing is shown in any case.
    """

    def __init__(
        self, plan: Mapping[str, int], owners: Mapping[int, str], weights: Mapping[str, float], *, shown: bool
    ) -> None:
        self._owners, self._weights = owners, weights
        self._reached: dict[int, int] = {}
        self._bars: dict[str, TaskID] = {}
        if shown and sys.stderr.isatty():
            from rich.progress import TaskProgressColumn

            self._progress = bars(TaskProgressColumn())  # what stays on the screen is the table
            total = sum(epochs * weights[name] for name, epochs in plan.items())
            self._whole = self._progress.add_task("all", total=total)
            self._bars = {name: self._progress.add_task(name, total=epochs) for name, epochs in plan.items()}

    def __enter__(self) -> Bars:
        """Begin to draw."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take an event.

        Args:
            event: ``epoch`` or ``notice``.
        """
        if event["event"] == "notice":
            print(event["text"], file=sys.stderr)
        if event["event"] == "epoch" and self._progress is not None:
            name = self._owners[event["task"]]
            steps = event["epoch"] - self._reached.get(event["task"], 0)
            self._reached[event["task"]] = event["epoch"]
            self._progress.advance(self._bars[name], steps)
            self._progress.advance(self._whole, steps * self._weights[name])
