"""From an interval to a word: confirmed, not confirmed, not decided."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from flatwise.lab.statistics import Estimate


class Verdict(str, Enum):
    """What the numbers say of a claim."""

    CONFIRMED = "confirmed"
    NOT_CONFIRMED = "not confirmed"
    NOT_DECIDED = "not decided"
    MISSING = "missing"

    def __str__(self) -> str:
        """Write the word."""
        return self.value


def judge_more(difference: Estimate | None) -> Verdict:
    """Judge "more": the whole 95 % interval lies above 0.

    Args:
        difference: paired, with its interval; None where a training is missing.

    Returns:
        Not confirmed where the whole interval is at most 0; not decided where it has both signs, or one seed ran.
    """
    if difference is None:
        return Verdict.MISSING
    if difference.ci95 is None:
        return Verdict.NOT_DECIDED
    if difference.mean - difference.ci95 > 0:
        return Verdict.CONFIRMED
    return Verdict.NOT_CONFIRMED if difference.mean + difference.ci95 <= 0 else Verdict.NOT_DECIDED


def judge_same(difference: Estimate | None, margin: float) -> Verdict:
    """Judge "the same": the whole 95 % interval lies within the margin on both sides of 0.

    Args:
        difference: paired, with its interval; None where a training is missing.
        margin: from which on a difference counts.

    Returns:
        Not confirmed where the whole interval lies outside of the margin; not decided where it lies across its edge.
    """
    if difference is None:
        return Verdict.MISSING
    if difference.ci95 is None:
        return Verdict.NOT_DECIDED
    low, high = difference.mean - difference.ci95, difference.mean + difference.ci95
    if -margin < low and high < margin:
        return Verdict.CONFIRMED
    return Verdict.NOT_CONFIRMED if low >= margin or high <= -margin else Verdict.NOT_DECIDED


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Judge a claim about several settings: it holds where it holds in all.

    Args:
        verdicts: one a setting.

    Returns:
        Not confirmed where it fails in one; else missing where one is missing, and not decided where one is.
    """
    for verdict in (Verdict.NOT_CONFIRMED, Verdict.MISSING, Verdict.NOT_DECIDED):
        if verdict in verdicts:
            return verdict
    return Verdict.CONFIRMED
