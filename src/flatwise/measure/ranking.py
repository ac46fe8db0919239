"""Do the measures agree on which model is flatter? Often they do not, and then none of them may be trusted alone.

Andriushchenko, Croce, Mueller, Hein and Flammarion, "A modern look at the relationship between sharpness and
generalization", ICML 2023: in many settings sharpness does not rank models as their test error does, and measures rank
them differently. A difference counts here where it is more than twice its standard error.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from flatwise.errors import UserError
from flatwise.measure.result import digits, plain
from flatwise.measure.rows import Row, Sharpness, aligned, html_table

NO_VERDICT = ("loss", "gradient_norm", "lambda_ratio")
"""Rows that say something else than how sharp a minimum is."""


@dataclass(frozen=True)
class Ranking:
    """Several models by the same measures.

    Attributes:
        models: their names.
        measures: names of the rows that all of them have, at the same settings.
        values: for each measure, the value of each model.
        standard_errors: for each measure, that of each model; None where there is none.
        flattest: for each measure, the model with the smallest value; None where another one cannot be told apart.
        disagreements: two models and two measures that order them differently, both by more than two standard errors:
            (measure, flatter, sharper, other measure).
        cautions: sentences.
    """

    models: tuple[str, ...]
    measures: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    standard_errors: tuple[tuple[float | None, ...], ...]
    flattest: tuple[str | None, ...]
    disagreements: tuple[tuple[str, str, str, str], ...]
    cautions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold.

        Returns:
            All fields.
        """
        result: dict[str, Any] = plain(self)
        return result

    def _cells(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [("measure", *self.models, "flattest")]
        for name, values, errors, best in zip(
            self.measures, self.values, self.standard_errors, self.flattest, strict=True
        ):
            numbers = [digits(value, error) for value, error in zip(values, errors, strict=True)]
            verdict = "" if name.split("[")[0] in NO_VERDICT else best or "cannot be told"
            lines.append((name, *numbers, verdict))
        return lines

    def __str__(self) -> str:
        """Write an aligned table and the cautions."""
        return "\n".join([*aligned(self._cells()), *(f"Caution: {sentence}" for sentence in self.cautions)])

    def _repr_html_(self) -> str:
        remarks = "".join(f"<li>Caution: {html.escape(sentence)}</li>" for sentence in self.cautions)
        return f"{html_table(self._cells())}<ul>{remarks}</ul>"


def compare_sharpness(tables: Mapping[str, Sharpness]) -> Ranking:
    """Set tables of several models beside each other, and say where measures disagree.

    Args:
        tables: by the name of the model; measured with the same settings on the same samples.

    Returns:
        The table and the cautions. Standard errors of two models are taken as independent, which on the same samples is
        on the careful side.

    Raises:
        UserError: if there are not two models, or they have no measure in common.
    """
    names = tuple(tables)
    if len(names) < 2:
        raise UserError(f"compare_sharpness needs the tables of at least two models, got {len(names)}")
    shared, others = _comparable(tables)
    if not any(rows[0].name not in NO_VERDICT for rows in shared):
        raise UserError("the tables have no measure in common that was taken at the same settings")
    cautions = [f"{name} was left out: it was not measured at the same settings everywhere" for name in others]
    conditions = [table.conditions for table in tables.values()]
    if len({(c.samples, c.mode, c.seed) for c in conditions}) > 1:
        cautions.append("the models were not measured on as many samples, in the same mode, with the same seed")
    ranked = [rows for rows in shared if rows[0].name not in NO_VERDICT]
    if all(row.standard_error is None for rows in ranked for row in rows):
        cautions.append("there are no standard errors: every difference is taken as real, and none need be")
    found = _disagreements(names, ranked)
    if found:
        name, flatter, sharper, other = found[0]
        more = f" ({len(found)} such cases)" if len(found) > 1 else ""
        cautions.append(
            f"the measures disagree: by {name} {flatter} is flatter than {sharper}, by {other} it is sharper{more}. "
            "Sharpness measures often do not rank models as they generalise (Andriushchenko et al., ICML 2023): "
            "let held-out accuracy decide"
        )
    return Ranking(
        models=names,
        measures=tuple(rows[0].name for rows in shared),
        values=tuple(tuple(row.value for row in rows) for rows in shared),
        standard_errors=tuple(tuple(row.standard_error for row in rows) for rows in shared),
        flattest=tuple(_flattest(names, rows) for rows in shared),
        disagreements=tuple(found),
        cautions=tuple(cautions),
    )


# What a search happened to do, not what it was asked to do.
_OUTCOMES = frozenset(
    ("noise", "highest_after", "error_of_draws", "error_of_parts", "residual", "products", "probes", "sigma", "method")
)


def _comparable(tables: Mapping[str, Sharpness]) -> tuple[list[list[Row]], list[str]]:
    shared: list[list[Row]] = []
    others: list[str] = []
    everything = dict.fromkeys(row.name for table in tables.values() for row in table.rows)
    for name in everything:
        rows = [row for table in tables.values() for row in table.rows if row.name == name]
        settings = [{k: v for k, v in row.settings.items() if k not in _OUTCOMES} for row in rows]
        if len(rows) == len(tables) and all(entry == settings[0] for entry in settings):
            shared.append(rows)
        else:
            others.append(name)
    return shared, others


def _order(one: Row, other: Row) -> int:
    """Return -1 where the first is flatter by more than two standard errors, 1 where the second is, or 0."""
    error = math.hypot(one.standard_error or 0.0, other.standard_error or 0.0)
    difference = one.value - other.value
    if not abs(difference) > 2 * error:
        return 0
    return -1 if difference < 0 else 1


def _disagreements(names: Sequence[str], ranked: Sequence[Sequence[Row]]) -> list[tuple[str, str, str, str]]:
    found = []
    for a, b in combinations(range(len(names)), 2):
        for one, other in combinations(ranked, 2):
            first, second = _order(one[a], one[b]), _order(other[a], other[b])
            if first * second < 0:
                flatter, sharper = (a, b) if first < 0 else (b, a)
                found.append((one[0].name, names[flatter], names[sharper], other[0].name))
    return found


def _flattest(names: Sequence[str], rows: Sequence[Row]) -> str | None:
    best = min(range(len(rows)), key=lambda index: rows[index].value)
    certain = all(_order(rows[best], row) < 0 for index, row in enumerate(rows) if index != best)
    return names[best] if certain else None
