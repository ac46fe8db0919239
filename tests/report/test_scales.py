"""Places and ticks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatwise.report.scales import Scale, short, spread


def test_places() -> None:
    up = Scale(0, 10, 100, 0)
    assert [up(0), up(5), up(10), up(99), up(-1)] == [100, 50, 0, 0, 100]
    log = Scale(0.01, 100, 0, 4, log=True)
    assert [log(0.01), log(1), log(100)] == pytest.approx([0, 2, 4])


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_inside_rising_and_few(low: float, length: float) -> None:
    scale = Scale(low, low + length, 0, 1)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 11
    assert ticks == sorted(set(ticks))
    assert all(low - 1e-6 * length <= tick <= low + length * (1 + 1e-6) for tick in ticks)


def test_ticks_of_a_logarithmic_axis_are_powers() -> None:
    assert Scale(2e-6, 3, 0, 1, log=True).ticks() == [1e-4, 1e-2, 1.0]
    assert Scale(2, 3, 0, 1, log=True).ticks() == [2, 3]


@pytest.mark.parametrize("values", [[1.0], [0.0], [2.0, 2.0], [-3.0], [1e-20, 1e-20]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_an_axis_has_two_different_ends(values: list[float], from_zero: bool) -> None:
    low, high = spread(values, from_zero=from_zero)
    assert low < high
    assert all(low <= value <= high for value in values)


def test_numbers_are_short() -> None:
    assert [short(v) for v in (0.05, 1234.5678, -0.5, 1e-6, 2.5e-7, 1e-4)] == [
        "0.05", "1235", "\u22120.5", "10\u207b\u2076", "2.5 \u00b7 10\u207b\u2077", "10\u207b\u2074",
    ]  # fmt: skip
