"""What is shown while one training runs: a bar with the time left on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from flatwise.measure.progress import Drawn, bars

if TYPE_CHECKING:
    from rich.progress import TaskID


class StepBar(Drawn):
    """One bar over all steps, on standard error.

    Args:
        shown: whether to show anything but notices.
    """

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._task: TaskID | None = None

    def __enter__(self) -> StepBar:
        """Begin to draw."""
        if self._shown and sys.stderr.isatty():
            from rich.progress import TaskProgressColumn

            self._progress = bars(TaskProgressColumn())
            self._progress.start()
        return self

    def step(self, done: int, total: int) -> None:
        """Move the bar.

        Args:
            done: steps made.
            total: of so many.
        """
        if self._progress is None:
            return
        if self._task is None:
            self._task = self._progress.add_task("training", total=total, completed=done)
            return
        self._progress.update(self._task, completed=done)

    def epoch(self, record: dict[str, Any]) -> None:
        """Say how an epoch went.

        Args:
            record: of the epoch.
        """
        held = record["validation_accuracy"]
        text = f"epoch {record['epoch']}: loss {record['train_loss']:.4f}"
        if held is not None:
            text += f", validation error {100 * (1 - held):.2f} %"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)
        elif self._shown:
            print(text, file=sys.stderr)

    def notice(self, text: str) -> None:
        """Show a sentence.

        Args:
            text: the sentence.
        """
        if self._progress is not None:
            self._progress.console.print(f"flatwise: {text}", markup=False)
        else:
            print(f"flatwise: {text}", file=sys.stderr)
