"""The studies at a size for two CPU cores, by their names on the command line."""

from __future__ import annotations

from flatwise.errors import UnknownNameError
from flatwise.lab.paper.small_ablations import C4, C5, M_NOISE, M
from flatwise.lab.paper.small_later import LATE, MSAM
from flatwise.lab.paper.small_tables import RHO, TABLE4, TABLE5, TABLE11
from flatwise.lab.paper.study import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (TABLE4, RHO, C5, TABLE11, M, M_NOISE, LATE, MSAM, C4, TABLE5)
}  # fmt: skip


def small_study(name: str) -> Study:
    """Find a study by its name.

    Args:
        name: such as ``"table4"``.

    Returns:
        The study.

    Raises:
        UnknownNameError: no such study.
    """
    if name not in STUDIES:
        raise UnknownNameError("study", name, STUDIES)
    return STUDIES[name]
