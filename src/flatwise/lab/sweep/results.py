"""What a sweep found: its trials as rows, the best first, and the command that trains the best on other seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from flatwise.lab.config import flag
from flatwise.lab.statistics import estimate
from flatwise.lab.sweep.config import SweepConfig
from flatwise.lab.train.config import TrainConfig

if TYPE_CHECKING:
    from optuna.study import Study

SCHEMA = "flatwise.sweep/1"


@dataclass(frozen=True)
class Row:
    """One trial that came to an end.

    Attributes:
        number: of the trial.
        method: what was trained with.
        rho: radius; None where the method has none to search.
        lr: peak learning rate.
        weight_decay: weight decay.
        accuracy: mean validation accuracy after the last epoch, or, of a trial that was stopped, the last one seen.
        accuracies: one for each finished training.
        ci95: half the 95 % confidence interval of the mean over the seeds; None for one seed.
        pruned: stopped before its end, so that its accuracy is no result.
        failed: why it could not be trained to its end, such as a loss that is no number; None otherwise.
        epoch: the last that was reported.
        seconds: that it took on its machine.
        machine: where it ran.
    """

    number: int
    method: str
    rho: float | None
    lr: float
    weight_decay: float
    accuracy: float | None
    accuracies: list[float]
    ci95: float | None
    pruned: bool
    failed: str | None
    epoch: int
    seconds: float
    machine: str


def rows_of(study: Study) -> list[Row]:
    """Read the trials that came to an end.

    Args:
        study: Optuna's.

    Returns:
        The finished ones, the best first, then those that were stopped, in the order of their numbers.
    """
    from optuna.trial import TrialState

    rows = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        facts = trial.user_attrs
        accuracies, pruned = list(facts["accuracies"]), trial.state is TrialState.PRUNED
        rows.append(
            Row(
                number=trial.number,
                **facts["chosen"],
                accuracy=trial.value,
                accuracies=accuracies,
                ci95=None if pruned else estimate(accuracies).ci95,
                pruned=pruned,
                failed=facts.get("failed"),
                epoch=max(trial.intermediate_values, default=0),
                seconds=facts["seconds"],
                machine=facts["machine"],
            )
        )
    return sorted(rows, key=lambda row: (row.pruned, 0.0 if row.pruned else -(row.accuracy or 0.0), row.number))


def finished(rows: Sequence[Row]) -> list[Row]:
    """Keep the trials that trained to their end.

    Args:
        rows: of all trials.

    Returns:
        Those not stopped, in the same order.
    """
    return [row for row in rows if not row.pruned]


def results_of(config: SweepConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Put together the content of ``results.json``.

    Args:
        config: the settings.
        rows: of all trials.

    Returns:
        Names, settings and rows; no address of a database.
    """
    best = finished(rows)[:1]
    return {
        "schema": SCHEMA,
        "study": config.name,
        "settings": config.settings(),
        "best": asdict(best[0]) if best else None,
        "again": command(config, best[0]) if best else None,
        "trials": [asdict(row) for row in rows],
    }


def command(config: SweepConfig, row: Row) -> str:
    """Write the command that trains a trial's settings on a seed that the sweep did not use.

    Args:
        config: the settings.
        row: the trial.

    Returns:
        A line for a shell.
    """
    chosen = replace(
        config.training,
        method=row.method,
        rho=row.rho,
        lr=row.lr,
        weight_decay=row.weight_decay,
        seed=config.seed + config.seeds,
        tracker=TrainConfig.tracker,
    )
    words = ["flatwise", "train"]
    for entry in fields(TrainConfig):
        value = getattr(chosen, entry.name)
        if value == entry.default:
            continue
        if isinstance(value, bool):
            words.append(flag(entry.name if value else f"no_{entry.name}"))
        else:
            words += [flag(entry.name), repr(value) if isinstance(value, float) else str(value)]
    return shlex.join(words)
