"""A plane as a file to be turned by hand, and the same heights and words on the page as on paper."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.measure.test_landscape import draw, network, samples

from flatwise.errors import UserError
from flatwise.measure import Landscape
from flatwise.report.captions import facts_of
from flatwise.report.heights import heights_of
from flatwise.report.planes import plane_of


@pytest.fixture(scope="module")
def plane() -> Landscape:
    found: Landscape = draw({"sgd": network(0), "<b>sam</b>": network(1)}, samples(), points=9)
    return found


def embedded(path: Path) -> Any:
    block = re.search(r'<script type="application/json">(.*?)</script>', path.read_text())
    assert block is not None
    return json.loads(block[1])


def test_surfaces_share_scale_and_camera_and_names_are_no_markup(plane: Landscape, tmp_path: Path) -> None:
    path = tmp_path / "plane.html"
    assert plane.plot(path, title="Two <i>networks</i>") is None
    text = path.read_text()
    assert "<h1>Two &lt;i&gt;networks&lt;/i&gt;</h1>" in text
    assert text.count("<canvas") == 2
    assert "<b>sam" not in text
    shown = embedded(path)
    assert [entry["name"] for entry in shown["surfaces"]] == ["sgd", "<b>sam</b>"]
    heights = [v for entry in shown["surfaces"] for row in entry["heights"] for v in row]
    assert (min(heights), max(heights)) == (0.0, 1.0)  # of both together: one scale


def test_what_cannot_be_turned_is_said(plane: Landscape, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a line has nothing to turn"):
        draw(network(), samples(), dimensions=1).plot(tmp_path / "line.html")
    with pytest.raises(UserError, match="not style='contour'"):
        plane.plot(tmp_path / "plane.html", "contour")


def test_the_page_draws_what_paper_shows(plane: Landscape) -> None:
    heights = heights_of(plane, None, None)
    shown = plane_of(plane)
    assert shown.log == heights.log
    assert [surface.losses for surface in shown.surfaces] == heights.values.tolist()
    for fact in facts_of(plane, heights):
        assert fact in shown.caption
    assert "2-D cut" in shown.caption
    cut = plane_of(plane, log=True, clip=float(plane.values.median()))
    assert cut.log
    assert "cut above" in cut.caption


def test_a_plane_that_is_not_complete_is_drawn_as_predicted(plane: Landscape) -> None:
    from dataclasses import replace

    states, values = plane.states.clone(), plane.values.clone()
    states[0, 3, 3], values[0, 3, 3] = 0, math.nan
    part = plane_of(replace(plane, states=states, values=values, complete=False))
    assert part.surfaces[0].losses[3][3] == pytest.approx(float(plane.values[0, 3, 3]), rel=0.5)
    assert "INCOMPLETE" in part.caption
    nothing = replace(plane, values=torch.full_like(plane.values, math.nan))
    with pytest.raises(UserError, match="nothing to draw"):
        plane_of(nothing)
