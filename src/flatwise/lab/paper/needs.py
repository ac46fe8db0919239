"""What a row needs: data, trainings, steps and GPU hours, for ``flatwise reproduce --list``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flatwise.lab.paper.experiments import experiment, experiment_names
from flatwise.lab.paper.rows import runs
from flatwise.lab.paper.steps import DATA, StepTime, passes_of, steps_of
from flatwise.lab.train.config import TrainConfig


@dataclass(frozen=True)
class Need:
    """What a row needs to be reproduced at full size.

    Attributes:
        table: the experiment.
        row: its row.
        data: the data sets.
        gigabytes: their size as downloaded.
        trainings: how many there are, all seeds and roles.
        steps: of all of them together.
        passes: gradients of all of them together, in units of a batch.
        hours: of the measured device, alone; None where nothing was measured.
        device: on which a step was measured.
    """

    table: str
    row: str
    data: tuple[str, ...]
    gigabytes: float
    trainings: int
    steps: int
    passes: float
    hours: float | None
    device: str | None


def needs(
    table: str, row: str, cell: str | None = None, *, measure: Callable[[TrainConfig], StepTime] | None = None
) -> Need:
    """Add up what the trainings of a row need.

    Args:
        table: one of ``experiment_names()``.
        row: one of its rows.
        cell: one of its cells; None: all.
        measure: times a step, as ``steps.measure_step`` does; None: no hours.

    Returns:
        The sum. Runs that several rows share are counted in each.
    """
    configs = [run.config for run in runs(table, row, cell)]
    alike: dict[TrainConfig, int] = {}
    for config in configs:
        key = _without_seed(config)
        alike[key] = alike.get(key, 0) + 1
    data = tuple(dict.fromkeys(config.dataset for config in configs))
    hours, device = None, None
    if measure is not None:
        hours = 0.0
        for config, count in alike.items():
            step = measure(config)
            hours, device = hours + count * steps_of(config) * step.seconds / 3600, step.device
    return Need(
        table,
        row,
        data,
        sum(DATA[name].bytes for name in data) / 1e9,
        len(configs),
        sum(count * steps_of(config) for config, count in alike.items()),
        sum(count * steps_of(config) * passes_of(config) for config, count in alike.items()),
        hours,
        device,
    )


def all_needs(measure: Callable[[TrainConfig], StepTime] | None = None) -> list[Need]:
    """Add up what every row needs.

    Args:
        measure: times a step; None: no hours.

    Returns:
        The rows of all experiments.
    """
    return [needs(table, row, measure=measure) for table in experiment_names() for row in experiment(table).rows]


def needs_table(rows: Sequence[Need]) -> str:
    """Write the table of ``flatwise reproduce --list``.

    Args:
        rows: what each row needs.

    Returns:
        A table in Markdown, and a sentence on what the hours are.
    """
    devices = {row.device for row in rows if row.device is not None}
    heads = ("table", "row", "data", "GB", "trainings", "steps", "gradients", "hours")
    lines = [
        (
            row.table,
            row.row,
            ", ".join(row.data),
            _rounded(row.gigabytes),
            str(row.trainings),
            f"{row.steps:,}",
            f"{row.passes:,.0f}",
            "not measured" if row.hours is None else _rounded(row.hours),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (heads, *lines)) for column in range(len(heads))]
    left = 3  # columns of words; the others are numbers
    text = ["| " + " | ".join(word.ljust(width) for word, width in zip(heads, widths, strict=True)) + " |"]
    text.append("|" + "|".join("-" * (width + 1) + "-:"[number >= left] for number, width in enumerate(widths)) + "|")
    for line in lines:
        words = [
            word.ljust(width) if number < left else word.rjust(width)
            for number, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("| " + " | ".join(words) + " |")
    text.append("")
    text.append("gradients: forward and backward passes over a batch. Searches for rho are not in these numbers.")
    if devices:
        text.append(
            f"hours: of one {' and one '.join(sorted(devices))}, from a step timed on random images; "
            "data loading and evaluation come on top."
        )
    else:
        text.append("hours: name a table to time a step of each of its networks here; with a GPU all are timed.")
    return "\n".join(text)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _without_seed(config: TrainConfig) -> TrainConfig:
    return replace(config, seed=0, labels_from=None)
