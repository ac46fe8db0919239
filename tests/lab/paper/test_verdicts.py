"""From an interval to a word: each word can be reached, and the edges are where they should be."""

from __future__ import annotations

import pytest

from flatwise.lab.paper.verdicts import Verdict, judge_more, judge_same, together
from flatwise.lab.statistics import Estimate

YES, NO, OPEN, NONE = Verdict.CONFIRMED, Verdict.NOT_CONFIRMED, Verdict.NOT_DECIDED, Verdict.MISSING


def about(mean: float, half: float | None) -> Estimate:
    return Estimate([], mean, half)


@pytest.mark.parametrize(
    ("mean", "half", "word"),
    [(1.0, 0.9, YES), (1.0, 1.0, OPEN), (1.0, 1.1, OPEN), (-1.0, 1.1, OPEN), (-1.0, 0.9, NO), (0.0, 0.0, NO),
     (5.0, None, OPEN), (-5.0, None, OPEN)],
)  # fmt: skip
def test_more(mean: float, half: float | None, word: Verdict) -> None:
    assert judge_more(about(mean, half)) is word


@pytest.mark.parametrize(
    ("mean", "half", "word"),
    [(0.1, 0.3, YES), (0.1, 0.4, OPEN), (0.6, 0.05, NO), (0.6, 0.2, OPEN), (-0.6, 0.05, NO), (-0.2, 0.2, YES),
     (0.0, None, OPEN)],
)  # fmt: skip
def test_same(mean: float, half: float | None, word: Verdict) -> None:
    assert judge_same(about(mean, half), 0.5) is word


def test_what_is_missing_is_said_to_be_missing() -> None:
    assert judge_more(None) is NONE
    assert judge_same(None, 1.0) is NONE


@pytest.mark.parametrize(
    ("words", "word"),
    [([YES, YES], YES), ([YES, NO], NO), ([YES, OPEN], OPEN), ([OPEN, NO], NO), ([YES, NONE], NONE),
     ([OPEN, NONE], NONE), ([NONE], NONE), ([NONE, NO], NO)],
)  # fmt: skip
def test_a_claim_about_several_settings(words: list[Verdict], word: Verdict) -> None:
    assert together(words) is word
