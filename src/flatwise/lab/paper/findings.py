"""What follows from a record: the paper's table with three numbers a cell, and a verdict for each claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flatwise.lab.paper.ranks import rank_correlations
from flatwise.lab.paper.record import Record
from flatwise.lab.paper.study import Arm, Claim, Setting
from flatwise.lab.paper.tables import table as paper_table
from flatwise.lab.paper.verdicts import Verdict, judge_more, judge_same, together
from flatwise.lab.statistics import Estimate, estimate, paired_difference

POINTS = 100
"""Accuracies are shares in the records and points in the tables."""


@dataclass(frozen=True)
class Cell:
    """One cell: the paper's number, ours, and what ours says.

    Attributes:
        printed: the paper's number, as printed; None where it prints none.
        ours: mean over the seeds, in the table's unit; None where a training is missing.
        difference: from the arm that all are compared with, paired; None for that arm itself.
        verdict: whether the difference has the sign that the paper's has; None where nothing is claimed.
    """

    printed: str | None
    ours: Estimate | None
    difference: Estimate | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        arm: its name.
        cells: one a setting, None where the setting does not have it.
        quantities: what was measured, by setting and heading.
        choices: what the held-out tenth chose, by setting.
        gradients: gradients a step, counted, over the settings.
        seconds: of one training, over the settings.
    """

    arm: str
    cells: tuple[Cell | None, ...]
    quantities: tuple[tuple[str, str, Estimate], ...]
    choices: tuple[tuple[str, Mapping[str, Any]], ...]
    gradients: float | None
    seconds: float | None


@dataclass(frozen=True)
class Judged:
    """A claim and what became of it.

    Attributes:
        text: the claim.
        where: in the paper.
        verdict: over all its settings.
        parts: for each setting the difference, in the claim's unit, and the verdict.
        unit: "points" or nothing.
    """

    text: str
    where: str
    verdict: Verdict
    parts: tuple[tuple[str, Estimate | None, Verdict], ...]
    unit: str


@dataclass(frozen=True)
class Findings:
    """All that follows from a record.

    Attributes:
        quantity: what the cells hold.
        columns: the settings.
        rows: the methods.
        claims: with their verdicts.
        ranks: rank correlation of measured quantities with the generalisation gap, by key.
    """

    quantity: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Judged, ...]
    ranks: tuple[tuple[str, Estimate], ...]


def find(record: Record) -> Findings:
    """Work out a study's tables and verdicts.

    Args:
        record: its trainings.

    Returns:
        The findings; what is missing is said to be missing.
    """
    study = record.study
    names = list(dict.fromkeys(arm.name for setting in study.settings for arm in setting.arms))
    ranks = rank_correlations(record)
    claims = [_judge(record, claim) for claim in study.claims]
    if ranks:
        claims.append(_ranks_rise(record, ranks))
    return Findings(
        quantity="test error, %" if _errors(record) else "test accuracy, %",
        columns=tuple(setting.name for setting in study.settings),
        rows=tuple(_row(record, name) for name in names),
        claims=tuple(claims),
        ranks=tuple(ranks.items()),
    )


def scaled(value: Estimate | None, by: float) -> Estimate | None:
    """Change the unit of an estimate.

    Args:
        value: in the old unit.
        by: new units in an old one.

    Returns:
        In the new unit.
    """
    if value is None or by == 1:
        return value
    half = None if value.ci95 is None else abs(by) * value.ci95
    return replace(value, per_seed=[by * one for one in value.per_seed], mean=by * value.mean, ci95=half)


def _row(record: Record, name: str) -> Row:
    study = record.study
    holding = [setting for setting in study.settings if any(arm.name == name for arm in setting.arms)]
    quantities, choices, gradients, seconds = [], [], [], []
    for setting in holding:
        for key, heading in study.quantities:
            value = record.mean(setting.name, name, key)
            if value is not None:
                quantities.append((setting.name, heading, scaled(value, _unit(key)) or value))
        choices.append((setting.name, record.choice(setting.name, name)))
        for line in record.reported(setting.name, name):
            seconds.append(line["seconds"])
            gradients.append(line["gradients_per_step"])
    cells = [_cell(record, setting, setting.arm(name)) if setting in holding else None for setting in study.settings]
    return Row(name, tuple(cells), tuple(quantities), tuple(choices), _mean(gradients), _mean(seconds))


def _errors(record: Record) -> bool:
    """Whether the cells hold errors, as the paper's table does, and not accuracies."""
    return record.study.table is not None and paper_table(record.study.table).better == "lower"


def _cell(record: Record, setting: Setting, arm: Arm) -> Cell:
    study, errors = record.study, _errors(record)
    versus = study.versus or setting.arms[0].name
    accuracies = record.values(setting.name, arm.name)
    ours = accuracies and estimate([POINTS * (1 - value if errors else value) for value in accuracies])
    printed, other = _printed(record, setting, arm), _printed(record, setting, setting.arm(versus))
    text = None if printed is None else printed[1]
    if arm.name == versus:
        return Cell(text, ours or None, None, None)
    difference = scaled(record.difference(setting.name, arm.name, versus), -POINTS if errors else POINTS)
    if printed is None or other is None or printed[0] == other[0] or not study.signed:
        return Cell(text, ours or None, difference, None)
    return Cell(text, ours or None, difference, judge_more(scaled(difference, 1 if printed[0] > other[0] else -1)))


def _printed(record: Record, setting: Setting, arm: Arm) -> tuple[float, str] | None:
    if record.study.table is None or arm.printed is None or setting.printed is None:
        return None
    row, _, kind = arm.printed.partition("/")
    column = f"{setting.printed}/{kind}" if kind else setting.printed
    number = paper_table(record.study.table).number(row, column)
    return None if number is None or number.usable is None else (number.usable, number.printed)


def _judge(record: Record, claim: Claim) -> Judged:
    names = claim.settings or tuple(setting.name for setting in record.study.settings)
    by = _unit(claim.of)
    parts = []
    for name in names:
        found = scaled(record.difference(name, claim.arm, claim.than, claim.of, claim.of_than), by)
        verdict = judge_more(found) if claim.better == "more" else judge_same(found, claim.margin)
        parts.append((name, found, verdict))
    verdict = together([part[2] for part in parts])
    return Judged(claim.text, claim.where, verdict, tuple(parts), "points" if by == POINTS else "")


def _ranks_rise(record: Record, ranks: Mapping[str, Estimate]) -> Judged:
    first, last = record.study.rank[0], record.study.rank[-1]
    difference = paired_difference(ranks[first].per_seed, ranks[last].per_seed)
    text = "The smaller m, the better m-sharpness ranks the trained networks by their generalisation gap"
    verdict = judge_more(difference)
    return Judged(
        text, "Figure 3 right", verdict, (("Kendall's tau, m = 1 minus the largest", difference, verdict),), ""
    )


def _unit(key: str) -> float:
    return POINTS if key.endswith(("_accuracy", "_fitted")) else 1


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
