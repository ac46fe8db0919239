"""A study's record: a line for each training, small enough to keep, from which everything else follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from flatwise.lab.paper.protocol import Result, Run, choose, held_out
from flatwise.lab.paper.study import ACCURACY, Fields, Study
from flatwise.lab.statistics import Estimate, estimate, paired_difference
from flatwise.lab.train.config import NOT_PART_OF_THE_RESULT, TrainConfig

SCHEMA = "flatwise.reproduce/1"
Line = dict[str, Any]


def line_of(run: Run, result: Result, measured: Mapping[str, float] | None) -> Line:
    """Shorten a finished training.

    Args:
        run: its place in the study.
        result: what it left.
        measured: what was measured of its weights, if anything.

    Returns:
        One line of the record.
    """
    line: Line = {
        "setting": run.setting,
        "arm": run.arm,
        "stage": run.stage,
        "seed": run.config.seed,
        "choice": dict(run.choice),
        "config": differences(run.config),
        "held_out_accuracy": held_out(result),
        "test_accuracy": result.get("test_accuracy"),
        "seconds": result.get("seconds"),
        "gradients_per_step": result.get("gradient_evaluations_per_step"),
    }
    for name in ("train_accuracy", "wrong_labels_fitted"):
        if result.get(name) is not None:
            line[name] = result[name]
    if measured is not None:
        line["measured"] = dict(measured)
    return {key: _short(value) for key, value in line.items()}


def differences(config: TrainConfig) -> Fields:
    """Say what decides a training's numbers and is not a default.

    Args:
        config: the training.

    Returns:
        The fields; the folder of another training is shortened to its own name.
    """
    kept: dict[str, Any] = {}
    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        if field.name not in NOT_PART_OF_THE_RESULT and value != field.default:
            kept[field.name] = value
    if config.labels_from is not None:
        kept["labels_from"] = config.labels_from.rpartition("/")[2]
    return kept


def _short(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _short(entry) for key, entry in value.items()}
    return value


@dataclass(frozen=True)
class Record:
    """What a study's trainings gave.

    Attributes:
        study: what they were for.
        lines: one a training.
        seeds: of the reported trainings, in order.
    """

    study: Study
    lines: Sequence[Line]
    seeds: Sequence[int]

    def select(self, setting: str, arm: str, stage: str) -> list[Line]:
        """Find lines.

        Args:
            setting: name of the setting.
            arm: name of the arm.
            stage: of the training.

        Returns:
            Those of the record's seeds where the stage reports, in their order.
        """
        found = [
            line for line in self.lines
            if (line["setting"], line["arm"], line["stage"]) == (setting, arm, stage)
        ]  # fmt: skip
        if stage == "tuning":
            return found
        by_seed = {line["seed"]: line for line in found}
        return [by_seed[seed] for seed in self.seeds if seed in by_seed]

    def reported(self, setting: str, arm: str) -> list[Line]:
        """Find the trainings that stand for an arm: of once and twice the epochs the better on the held-out tenth.

        Args:
            setting: name of the setting.
            arm: name of the arm.

        Returns:
            One line a seed; none where a seed is missing.
        """
        final = self.select(setting, arm, "final")
        if len(final) < len(self.seeds):
            return []
        if not self.study.setting(setting).arm(arm).twice:
            return final
        twice = self.select(setting, arm, "twice")
        if len(twice) < len(self.seeds):
            return []
        place = choose([[line["held_out_accuracy"] for line in rows] for rows in (final, twice)])
        return (final, twice)[place]

    def values(self, setting: str, arm: str, of: str = ACCURACY) -> list[float] | None:
        """Give a quantity of an arm, seed by seed.

        Args:
            setting: name of the setting.
            arm: name of the arm.
            of: the accuracy, or what was measured.

        Returns:
            The values; None where one is missing.
        """
        lines = self.reported(setting, arm)
        found = [line.get(of) if of in line else line.get("measured", {}).get(of) for line in lines]
        known = [float(value) for value in found if value is not None]
        return known if known and len(known) == len(found) else None

    def mean(self, setting: str, arm: str, of: str = ACCURACY) -> Estimate | None:
        """Estimate a quantity of an arm.

        Args:
            setting: name of the setting.
            arm: name of the arm.
            of: the accuracy, or what was measured.

        Returns:
            Mean and interval over the seeds; None where a seed is missing.
        """
        values = self.values(setting, arm, of)
        return None if values is None else estimate(values)

    def difference(
        self, setting: str, arm: str, than: str, of: str = ACCURACY, of_than: str | None = None
    ) -> Estimate | None:
        """Estimate by how much an arm has more of a quantity than another.

        Args:
            setting: name of the setting.
            arm: name of the arm.
            than: name of the other arm.
            of: the accuracy, or what was measured.
            of_than: the quantity of the other arm, where it is another.

        Returns:
            Mean and interval of the paired differences; None where a seed is missing.
        """
        values, others = self.values(setting, arm, of), self.values(setting, than, of_than or of)
        return None if values is None or others is None else paired_difference(values, others)

    def choice(self, setting: str, arm: str) -> Fields:
        """Say what was chosen for an arm.

        Args:
            setting: name of the setting.
            arm: name of the arm.

        Returns:
            The fields, the doubled epochs among them; nothing where it is not known yet.
        """
        lines = self.reported(setting, arm)
        if not lines:
            return {}
        chosen: Fields = lines[0]["choice"]
        return {**chosen, "epochs": lines[0]["config"]["epochs"]} if lines[0]["stage"] == "twice" else chosen
