"""The paper's protocol: which trainings a study takes, and what is chosen on the held-out tenth.

Foret et al. (section 3 and appendix C): learning rate and weight decay are chosen on the base optimizer, SAM takes them
over and has only rho chosen; the base may train for twice the epochs, since a SAM step costs two gradients, and the
better of the two is reported. What a later training looks like may depend on earlier ones, so a plan grows: it is asked
for again when its trainings have finished, until it holds nothing new. No choice sees a test accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flatwise.lab.paper.study import Arm, Fields, Setting, Study
from flatwise.lab.train.config import TrainConfig
from flatwise.lab.train.folder import TrainFolder

Stage = Literal["tuning", "final", "twice"]
Result = Mapping[str, Any]
HELD_OUT = 0.1
QUIET: Fields = {"tracker": "none", "quiet": True, "val_fraction": HELD_OUT}


@dataclass(frozen=True)
class Run:
    """One training and its place in a study.

    Attributes:
        setting: name of the setting.
        arm: name of the arm.
        stage: ``"tuning"`` chooses, ``"final"`` is reported, ``"twice"`` is the base for twice the epochs.
        choice: the candidate, with what is taken over from other arms.
        config: the training.
    """

    setting: str
    arm: str
    stage: Stage
    choice: Fields
    config: TrainConfig


Finished = Callable[[TrainConfig], Result | None]


def held_out(result: Result) -> float:
    """Read the accuracy on the held-out tenth after the last epoch.

    Args:
        result: of a training.

    Returns:
        The accuracy; -1 where training broke down, so that it is never chosen.
    """
    value = result.get("validation_accuracy")
    if value is None:
        history = result.get("history") or [{}]
        value = history[-1].get("validation_accuracy")
    return -1.0 if value is None or math.isnan(value) else float(value)


def choose(scores: Sequence[Sequence[float]]) -> int:
    """Choose a candidate by its mean accuracy on the held-out tenth.

    Args:
        scores: for each candidate one a seed.

    Returns:
        Its place; of equal ones the first.
    """
    means = [math.fsum(row) / len(row) for row in scores]
    return max(range(len(means)), key=means.__getitem__)


def plan(
    study: Study, finished: Finished, out: Path, names: Sequence[str] = (), *, data_root: str | None = None
) -> list[Run]:
    """List the trainings of a study, as far as they can be told from what has finished.

    Args:
        study: the study.
        finished: gives the result of a training, or None where it has none yet.
        out: the folder of all trainings.
        names: settings to plan; none: all.
        data_root: folder in which to look for the data.

    Returns:
        The trainings, finished or not.
    """
    place: Fields = {"out": str(out), "data_root": data_root}
    runs: list[Run] = []
    for setting in study.settings:
        if not names or setting.name in names:
            runs += _Setting(study, setting, finished, place).runs()
    return runs


class _Setting:
    """One setting's trainings, arm after arm."""

    def __init__(self, study: Study, setting: Setting, finished: Finished, place: Fields) -> None:
        self._study, self._setting, self._finished, self._place = study, setting, finished, place
        self._choices: dict[str, Fields] = {}
        self._finals: dict[tuple[str, int], TrainConfig] = {}

    def runs(self) -> Iterator[Run]:
        base, *others = self._setting.arms
        yield from self._arm(base, {})
        shared = self._choices.get(base.name)
        if shared is None:
            return
        for arm in others:
            taken: Fields | None = shared
            if arm.like is not None:
                taken = self._choices.get(arm.like)
            if taken is not None:
                yield from self._arm(arm, taken)

    def _arm(self, arm: Arm, taken: Fields) -> Iterator[Run]:
        if len(arm.candidates) > 1:
            tuning = [[self._run(arm, "tuning", seed, {**taken, **c}) for seed in self._study.tuning_seeds]
                      for c in arm.candidates]  # fmt: skip
            for row in tuning:
                yield from row
            results = [[self._finished(run.config) for run in row] for row in tuning]
            scores = [[held_out(result) for result in row if result is not None] for row in results]
            if any(len(row) < len(self._study.tuning_seeds) for row in scores):
                return
            choice = tuning[choose(scores)][0].choice
        else:
            choice = {**taken, **arm.candidates[0]}
        self._choices[arm.name] = choice
        for seed in self._study.seeds:
            labels: Fields = {}
            if arm.labels_from is not None:
                teacher = self._finals.get((arm.labels_from, seed))
                if teacher is None or self._finished(teacher) is None:
                    continue
                labels = {"labels_from": str(TrainFolder.of(teacher).path)}
            run = self._run(arm, "final", seed, choice, labels)
            self._finals[arm.name, seed] = run.config
            yield run
            if arm.twice:
                yield replace(run, stage="twice", config=replace(run.config, epochs=2 * run.config.epochs))

    def _run(self, arm: Arm, stage: Stage, seed: int, choice: Fields, more: Fields | None = None) -> Run:
        fields = {**self._place, **QUIET, **self._setting.fields, **arm.fields, **choice, **(more or {})}
        fields["method"] = str(fields.get("method", "sam")).replace("{seed}", str(seed))
        if self._study.kept and stage == "final":
            fields["keep_epochs"] = self._study.kept
        config = TrainConfig(**fields, seed=seed)
        return Run(self._setting.name, arm.name, stage, dict(choice), config)
