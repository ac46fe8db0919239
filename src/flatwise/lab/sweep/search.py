"""The search: begins trials, reports their epochs to the study, stops the poor ones, and tells how they ended."""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flatwise.errors import TrainingError
from flatwise.lab.child import Event
from flatwise.lab.sweep.config import SweepConfig
from flatwise.lab.sweep.perform import Task
from flatwise.lab.sweep.storage import Heart
from flatwise.lab.sweep.study import Opened, first, give_back, reclaim

if TYPE_CHECKING:
    from optuna.trial import Trial

HOPELESS = 3
"""Trials that may fail before one is trained to its end."""
Watch = Callable[[str, int], None]
"""Takes what happened (``epoch``, ``finished``, ``pruned``, ``again``) and the number of the trial."""


@dataclass
class Running:
    """A trial that is being trained.

    Attributes:
        trial: Optuna's.
        start: when it was begun here.
        accuracies: of its finished trainings.
        epochs: of its finished trainings, all together.
    """

    trial: Trial
    start: float
    accuracies: list[float] = field(default_factory=list)
    epochs: int = 0


class Search:
    """What hands out trials and hears of them; every word to the study is said here, in one process a machine.

    Use it as a context: on leaving, also by an error or Ctrl-C, each trial that did not end is queued again.

    Args:
        config: the settings.
        opened: the study.
        folder: the study's folder.
        heart: gives signs of life of running trials.
        watch: is told what happened.
    """

    def __init__(self, config: SweepConfig, opened: Opened, folder: Path, heart: Heart, watch: Watch) -> None:
        self._config, self._opened, self._folder = config, opened, folder
        self._heart, self._watch = heart, watch
        self._failures: list[str] = []
        self._successes = 0
        self._space, self._training = config.space, config.training
        self._running: dict[int, Running] = {}
        self._end = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes

    def __enter__(self) -> Search:
        """Begin."""
        return self

    def __exit__(self, *reason: object) -> None:
        """Queue again what did not end: the process was asked to stop, or another trial failed."""
        for number in list(self._running):
            self._leave(number)
            give_back(self._opened.study, self._opened.study.trials[number], innocent=True)

    def next_task(self) -> Task | None:
        """Begin a trial.

        Returns:
            What to train, or None where the budget of trials or of time is used up.
        """
        from optuna.trial import TrialState

        study = self._opened.study
        if time.monotonic() >= self._end:
            return None
        reclaim(self._opened)
        counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        if len(study.get_trials(deepcopy=False, states=counted)) >= self._config.trials:
            return None
        with warnings.catch_warnings():
            # Optuna takes it that heartbeats come from its own loop; here they come from Heart.
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            trial = study.ask()
        self._running[trial.number] = Running(trial, time.monotonic())
        trial.set_user_attr("owner", self._opened.owner)
        trial.set_user_attr("machine", platform.node())
        self._heart.add(study.study_name, trial.number)
        chosen = self._space.suggest(trial)
        trial.set_user_attr("chosen", chosen)
        place = self._folder / "trials" / f"{first(study.trials[trial.number]):04d}"
        base = replace(self._training, **chosen, out=str(place), quiet=True)
        seeds = range(self._config.seed, self._config.seed + self._config.seeds)
        return {"trial": trial.number, "runs": [asdict(replace(base, seed=seed)) for seed in seeds]}

    def hear(self, event: Event) -> bool:
        """Take an event.

        Args:
            event: as ``perform`` tells it.

        Returns:
            Whether the trial is to end here.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        number = event["trial"]
        running = self._running.get(number)
        if running is None:  # it was stopped, or another machine took it for dead
            return True
        try:
            if event["event"] == "epoch":
                return self._epoch(running, event)
            if event["event"] == "run":
                running.accuracies.append(event["accuracy"])
                running.epochs += event["epochs"]
            elif event["event"] == "done":
                self._successes += 1
                self._finish(running, math.fsum(running.accuracies) / len(running.accuracies))
            elif event["event"] == "failed":
                self._fail(running, event["text"])
        except UpdateFinishedTrialError:
            self._leave(number)
            return True
        return False

    def lost(self, number: int, cause: str) -> None:
        """Queue a trial again whose process ended.

        Args:
            number: the trial.
            cause: how.

        Raises:
            TrainingError: that happened too often.
        """
        self._leave(number)
        if not give_back(self._opened.study, self._opened.study.trials[number]):
            raise TrainingError(
                f"the process of trial {number} keeps ending ({cause}); the same command goes on without that trial"
            )
        self._watch("again", number)

    def _epoch(self, running: Running, event: Event) -> bool:
        trial, accuracy = running.trial, event["accuracy"]
        if accuracy is not None and math.isfinite(accuracy):
            # The mean over the trainings so far, so that a step means the same in every trial.
            values = [*running.accuracies, accuracy]
            trial.report(math.fsum(values) / len(values), running.epochs + event["epoch"])
        if self._last(running, event) or not trial.should_prune():
            self._watch("epoch", trial.number)
            return False
        # First the study, then the training: killed in between, a stopped trial is no finished one.
        self._finish(running, None)
        return True

    def _fail(self, running: Running, text: str) -> None:
        # For the search, a trial that cannot be trained is as one that was stopped early: a bad one.
        running.trial.set_user_attr("failed", text)
        self._finish(running, None)
        self._failures.append(text)
        if len(self._failures) == HOPELESS and not self._successes:
            raise TrainingError(f"the first {HOPELESS} trials failed; the last: {text}")

    def _last(self, running: Running, event: Event) -> bool:
        whole = len(running.accuracies) == self._config.seeds - 1
        return whole and self._training.steps is None and event["epoch"] == self._training.epochs

    def _finish(self, running: Running, value: float | None) -> None:
        from optuna.trial import TrialState

        running.trial.set_user_attr("accuracies", running.accuracies)
        running.trial.set_user_attr("seconds", round(time.monotonic() - running.start, 3))
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        self._opened.study.tell(running.trial, value, state, skip_if_finished=True)
        self._leave(running.trial.number)
        self._watch("pruned" if value is None else "finished", running.trial.number)

    def _leave(self, number: int) -> None:
        self._heart.remove(number)
        self._running.pop(number, None)
