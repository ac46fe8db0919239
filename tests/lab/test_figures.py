"""The figure: what is drawn, and that drawing leaves matplotlib's global state alone."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
from matplotlib.figure import Figure

from flatwise.report.bands import Band, Panel
from flatwise.report.figures import draw_panels


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig

    def watched(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def test_lines_bands_and_legend(drawn: list[Figure]) -> None:
    bands = [Band("sgd", [1, 2, 3], [50, 60, 70], [5, 5, 5]), Band("sam", [1, 2, 3], [80, 90, 99], [5, 5, 5])]
    file = io.BytesIO()
    panels = [Panel("Loss", "nats", bands[::-1]), Panel("Accuracy", "%", bands, limits=(0, 100))]
    draw_panels(panels, file, title="title", subtitle="subtitle", horizontal="epoch")
    assert file.getvalue().startswith(b"\x89PNG")
    (figure,) = drawn
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in right.get_lines()] == [[50, 60, 70], [80, 90, 99]]
    colours = {axes: [line.get_color() for line in axes.get_lines()] for axes in (left, right)}
    assert colours[left] == colours[right][::-1]
    # The upper band would reach 104 %.
    highest = max(vertex[1] for path in right.collections[1].get_paths() for vertex in path.vertices)
    assert highest == 100
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sam", "sgd"]


def test_nothing_global_is_used() -> None:
    code = "import flatwise.report.figures, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
