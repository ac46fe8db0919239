"""Means, intervals and paired differences against scipy and against a computation by hand."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from flatwise.lab.statistics import estimate, paired_difference

A = [0.71, 0.69, 0.74, 0.70, 0.72]
B = [0.95, 0.96, 0.94, 0.97, 0.95]


def test_by_hand() -> None:
    # mean 2, deviations -1 0 1, s = 1, t(0.975, 2) = 4.30265
    result = estimate([1.0, 2.0, 3.0])
    assert result.mean == 2.0
    assert result.ci95 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_the_interval_is_students() -> None:
    result = estimate(A)
    low, high = stats.t.interval(0.95, 4, loc=sum(A) / 5, scale=stats.sem(A))
    assert result.mean - result.ci95 == pytest.approx(low)
    assert result.mean + result.ci95 == pytest.approx(high)


def test_the_paired_interval_is_that_of_the_paired_test() -> None:
    result = paired_difference(B, A)
    interval = stats.ttest_rel(B, A).confidence_interval(0.95)
    assert result.mean - result.ci95 == pytest.approx(interval.low)
    assert result.mean + result.ci95 == pytest.approx(interval.high)
    assert result.per_seed == pytest.approx([b - a for a, b in zip(A, B, strict=True)])


def test_one_seed_has_no_interval() -> None:
    assert estimate([0.5]).ci95 is None


def test_unequal_numbers_of_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference(A, B[:4])
