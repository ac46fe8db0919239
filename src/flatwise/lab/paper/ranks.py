"""Does a measure rank trained networks by their generalisation gap? Kendall's tau over the arms, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence

from flatwise.lab.paper.record import Record
from flatwise.lab.statistics import Estimate, estimate

FEWEST = 3


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Compute Kendall's tau-b (Kendall, Biometrika 1945).

    Args:
        first: one value a network.
        second: another value of each.

    Returns:
        From -1 to 1; 0 where one of them is the same for all.
    """
    signs = [
        (_sign(a - b), _sign(c - d))
        for place, (a, c) in enumerate(zip(first, second, strict=True))
        for b, d in list(zip(first, second, strict=True))[:place]
    ]
    agreement = sum(one * other for one, other in signs)
    untied = sum(one != 0 for one, _ in signs) * sum(other != 0 for _, other in signs)
    return float(agreement / untied**0.5) if untied else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def rank_correlations(record: Record) -> dict[str, Estimate]:
    """Correlate what was measured with the gap between training and test accuracy.

    Args:
        record: of a study that asks for it.

    Returns:
        For each key of ``rank`` the mean of tau over the seeds, with its interval; nothing where too little is there.
    """
    found: dict[str, Estimate] = {}
    for key in record.study.rank:
        columns = []
        for setting in record.study.settings:
            for arm in setting.arms:
                values, gaps = record.values(setting.name, arm.name, key), record.values(setting.name, arm.name, "gap")
                if values is not None and gaps is not None:
                    columns.append((values, gaps))
        if len(columns) < FEWEST:
            return {}
        found[key] = estimate([
            kendall([values[seed] for values, _ in columns], [gaps[seed] for _, gaps in columns])
            for seed in range(len(record.seeds))
        ])  # fmt: skip
    return found
