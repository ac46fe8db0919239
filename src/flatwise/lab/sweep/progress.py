"""What is shown while a sweep runs: trials done, the best so far and the time left; off a terminal, nothing."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from flatwise.lab.sweep.config import SweepConfig
from flatwise.measure.progress import Drawn

if TYPE_CHECKING:
    from optuna.study import Study
    from rich.progress import Progress


class Bars(Drawn):
    """A bar of the trials, on standard error.

    Args:
        config: the settings.
        study: Optuna's.
    """

    def __init__(self, config: SweepConfig, study: Study) -> None:
        self._config, self._study = config, study
        self._start = time.monotonic()
        self._before = self._done()
        self._epochs: dict[int, int] = {}
        if not config.quiet and sys.stderr.isatty():
            self._progress = _progress()
            self._task = self._progress.add_task("sweep", total=config.trials, best="", left="")

    def __enter__(self) -> Bars:
        """Begin to draw."""
        if self._progress is not None:
            self._progress.start()
            self._show()
        return self

    def __call__(self, event: str, number: int) -> None:
        """Take what happened.

        Args:
            event: ``epoch``, ``finished``, ``pruned`` or ``again``.
            number: the trial.
        """
        if event == "again":
            self._epochs.pop(number, None)
            print(f"The process of trial {number} ended; the trial is begun again.", file=sys.stderr)
        elif event == "epoch":
            self._epochs[number] = self._epochs.get(number, 0) + 1
        else:
            self._epochs.pop(number, None)
        if self._progress is not None:
            self._show()

    def _done(self) -> int:
        from optuna.trial import TrialState

        return len(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))

    def _show(self) -> None:
        assert self._progress is not None
        done = self._done()
        training = self._config.training
        whole = self._config.seeds * training.epochs
        # Where the length is given in steps, an epoch's share is unknown, and a trial counts when it has ended.
        parts = 0.0 if training.steps is not None else sum(self._epochs.values()) / whole
        left = time_left(
            time.monotonic() - self._start,
            done - self._before + parts,
            self._config.trials - done - parts,
            None if self._config.minutes is None else 60 * self._config.minutes,
        )
        self._progress.update(
            self._task,
            completed=done + parts,
            best=_best(self._study),
            left="" if left is None else f"{_clock(left)} left",
        )


def time_left(elapsed: float, done: float, rest: float, budget: float | None) -> float | None:
    """Estimate how long a sweep still takes.

    Args:
        elapsed: seconds since it began or was continued.
        done: trials since then, parts of trials counted.
        rest: trials to go, counted alike.
        budget: seconds after which no trial is begun.

    Returns:
        Seconds; None where nothing is known yet.
    """
    if done <= 0:
        return None
    left = max(0.0, rest) * elapsed / done
    # Trials that run when the budget is used up are finished: half of one, on average.
    return left if budget is None else min(left, max(0.0, budget - elapsed) + elapsed / done / 2)


def _best(study: Study) -> str:
    try:
        best = study.best_trial
    except ValueError:  # none is finished
        return ""
    chosen = best.user_attrs["chosen"]
    radius = "" if chosen["rho"] is None else f" rho {chosen['rho']:.2g}"
    return f"best {100 * (best.value or 0.0):.1f} % ({chosen['method']}{radius})"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.completed:.0f}/{task.total:.0f} trials"),
        BarColumn(),
        TextColumn("{task.fields[best]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
        transient=True,
    )
