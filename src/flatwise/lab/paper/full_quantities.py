"""What a table at the paper's size is about: the error or accuracy, and what else its columns and figures show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flatwise.lab.paper.measures import measured
from flatwise.lab.paper.rows import Run
from flatwise.lab.paper.tables import table, table_names
from flatwise.lab.paper.tasks import result_of

HELD_OUT_TABLES = ("8",)
"""Tables that print the error on the held-out tenth."""
MEASURES = {"11": "by-steps", "c4": "by-epoch", "m": "by-size", "spectra": "by-spectrum"}
"""What is measured of the trained weights."""


@dataclass(frozen=True)
class Quantity:
    """Something that a training ends with.

    Attributes:
        name: its heading.
        read: gives it of a finished training; None where it is missing.
        claim: what is claimed of a method beside its reference.
        columns: of the paper's table, with {cell} and {kind}; the first that exists counts.
    """

    name: str
    read: Callable[[Run], float | None]
    claim: Literal["lower", "higher", "same"]
    columns: tuple[str, ...]

    @property
    def is_score(self) -> bool:
        """Whether it is an error or an accuracy, which is better or worse, and not only higher or lower."""
        return self.name.endswith("%")


def quantities_of(name: str) -> tuple[Quantity, ...]:
    """List what a table is about.

    Args:
        name: of the experiment.

    Returns:
        The error or the accuracy first.
    """
    lower = name not in table_names() or table(name).better == "lower"
    key = "validation_accuracy" if name in HELD_OUT_TABLES else "test_accuracy"
    claim: Literal["lower", "higher", "same"] = "same" if name == "11" else "lower" if lower else "higher"
    columns = ("{cell}", "{cell}/{kind}", "top1/{kind}", "{cell}/error")
    main = Quantity("error, %" if lower else "accuracy, %", _percent(key, lower=lower), claim, columns)
    if name == "2":
        return main, Quantity("top-5 error, %", _percent("test_top5_accuracy", lower=True), "lower", ("top5/{kind}",))
    more: list[tuple[str, str, Literal["lower", "higher", "same"], str]] = []
    if name == "11":
        more = [("sharpness_own_steps", "sharpness", "higher", "{cell}/sharpness")]
    elif name == "c4":
        more = [(f"cosine_{when}", f"cosine, {when.replace('_', ' ')}", "lower", "") for when in ("first_half", "end")]
    elif name == "m":
        more = [("gap", "train minus test accuracy", "lower", "")]
        more += [(f"m_sharpness_{m}", f"{m}-sharpness", "lower", "") for m in (1, 4, 16, 64)]
    elif name == "spectra":
        more = [
            (f"{key}_{epoch}", f"{words}, epoch {epoch}", "lower", f"{epoch}/{key}")
            for epoch in (1, 50, 300)
            for key, words in (("largest", "largest eigenvalue"), ("ratio", "its ratio to the fifth"))
        ]
    return main, *(Quantity(words, _measured(name, key), claim, (column,)) for key, words, claim, column in more)


def _percent(key: str, *, lower: bool) -> Callable[[Run], float | None]:
    def read(run: Run) -> float | None:
        share = (result_of(run.config) or {}).get(key)
        return None if share is None else 100 * (1 - share if lower else share)

    return read


def _measured(name: str, key: str) -> Callable[[Run], float | None]:
    return lambda run: (measured(MEASURES[name], run.config) or {}).get(key)
