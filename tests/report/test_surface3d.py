"""Surfaces: the projection is a rotation, one scale for all, near patches are drawn last."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatwise.report.surface3d import (
    COLOURS,
    STRETCH,
    Surface,
    colour,
    common_range,
    for_script,
    project,
    static_surface,
)

SHARE = st.floats(-1, 1)


@given(SHARE, SHARE, st.floats(0, 1), st.floats(-180, 180), st.floats(-10, 90))
def test_looking_keeps_lengths(x: float, y: float, z: float, azimuth: float, elevation: float) -> None:
    seen = project(x, y, z, azimuth, elevation)
    assert math.hypot(*seen) == pytest.approx(math.hypot(x, y, STRETCH * (2 * z - 1)), abs=1e-9)


def test_from_above_the_axes_are_those_of_a_map() -> None:
    right, down, _ = project(1, 0, 0.5, 0, 90)
    assert (right, down) == pytest.approx((1, 0))
    assert project(0, 0, 1, 0, 90)[2] > project(0, 0, 0, 0, 90)[2]  # higher is nearer


def test_from_the_side_higher_is_higher() -> None:
    assert project(0, 0, 1, 20, 0)[1] < project(0, 0, 0, 20, 0)[1]


def test_one_scale_serves_all() -> None:
    low, high = Surface("a", [[1.0, 2.0]]), Surface("b", [[5.0, None]])
    limits = common_range([low, high])
    assert (limits.low, limits.high, limits.log) == (1.0, 5.0, False)
    assert [limits.share(v) for v in (1.0, 3.0, 5.0, 9.0)] == [0.0, 0.5, 1.0, 1.0]
    assert common_range([Surface("a", [[0.01, 9.0]])]).log
    assert not common_range([Surface("a", [[0.0, 9.0]])]).log
    assert common_range([Surface("a", [[None]])]).low == 0.0


def test_a_flat_surface_has_a_scale() -> None:
    limits = common_range([Surface("a", [[2.0, 2.0], [2.0, 2.0]])])
    assert limits.high > limits.low
    assert 0 <= limits.share(2.0) <= 1


def test_colours_rise_in_lightness() -> None:
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (colour(n / 40) for n in range(41))]
    assert light == sorted(light)
    assert colour(-1) == COLOURS[0]
    assert colour(2) == COLOURS[-1]


def test_patches_with_unknown_corners_are_left_out() -> None:
    whole = Surface("a", [[1.0] * 4 for _ in range(4)])
    holed = Surface("a", [[1.0] * 4, [1.0, math.nan, 1.0, 1.0], [1.0] * 4, [1.0] * 4])
    patches = [static_surface(s, common_range([whole]), "").count(' fill="#') for s in (whole, holed)]
    assert patches == [9, 5]


def test_near_patches_are_drawn_last() -> None:
    n = 5
    surface = Surface("a", [[float(i + j) for j in range(n)] for i in range(n)])
    drawing = static_surface(surface, common_range([surface]), "")
    fills = re.findall(r' fill="(#\w+)"', drawing)
    # The height rises towards the viewer here, so the last patch is the highest.
    assert fills[-1] == "#%02x%02x%02x" % colour(7 / 8)  # noqa: UP031
    assert fills[0] == "#%02x%02x%02x" % colour(1 / 8)  # noqa: UP031


def test_a_fine_grid_is_thinned_for_the_still_drawing_only() -> None:
    n = 101
    surface = Surface("a", [[float(i) for _ in range(n)] for i in range(n)])
    limits = common_range([surface])
    assert static_surface(surface, limits, "").count(' fill="#') <= 32 * 32
    heights = for_script([surface], limits, ("x", "y"), (-1, 1, -1, 1))["surfaces"][0]["heights"]
    assert (len(heights), len(heights[0])) == (n, n)
