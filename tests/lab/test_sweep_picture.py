"""The picture and the progress of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from flatwise.lab.sweep.picture import draw
from flatwise.lab.sweep.progress import time_left
from flatwise.lab.sweep.results import Row


def row(number: int, method: str = "sam", rho: float | None = 0.1, accuracy: float | None = 0.5, **more: Any) -> Row:
    facts = {"lr": 0.1 + 0.01 * number, "weight_decay": 0.0, "accuracies": [accuracy], "ci95": None, "pruned": False}
    rest = {"failed": None, "epoch": 2, "seconds": 1.0, "machine": "here"}
    return Row(number=number, method=method, rho=rho, accuracy=accuracy, **{**facts, **rest, **more})


MANY = [row(n, ("sam", "asam")[n % 2], 0.01 * 2**n, 0.1 * n, ci95=0.02) for n in range(8)]


@pytest.mark.parametrize(
    "rows",
    [
        MANY,
        [*MANY, row(8, "base", None, 0.6), row(9, pruned=True, accuracies=[]), row(10, accuracy=None, pruned=True)],
        [row(0)],
        [row(0, "base", None)],
        [row(0, rho=0.0), row(1, rho=0.5)],
        [row(0, pruned=True, accuracies=[])],
    ],
)
def test_a_picture_can_be_drawn_of_whatever_a_sweep_found(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "sweep.png"
    draw(rows, path, title="mlp on digits", subtitle="one seed each")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.png"]


def test_the_points_are_the_trials_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[float], list[float]]] = []
    errorbar = Axes.errorbar

    def keep(self: Axes, x: list[float], y: list[float], **words: Any) -> Any:
        drawn.append((x, y))
        return errorbar(self, x, y, **words)

    monkeypatch.setattr(Axes, "errorbar", keep)
    draw([row(0), row(1, rho=0.2, accuracy=0.7), row(2, rho=0.3, pruned=True, accuracies=[])], tmp_path / "a.png",
         title="", subtitle="")  # fmt: skip
    assert drawn == [([0.1, 0.2], [50.0, 70.0])]


@pytest.mark.parametrize(
    ("elapsed", "done", "rest", "budget", "left"),
    [
        (10.0, 0.0, 5.0, None, None),
        (10.0, 2.0, 8.0, None, 40.0),
        (10.0, 0.5, 9.5, None, 190.0),
        (10.0, 2.0, 8.0, 1000.0, 40.0),
        (10.0, 2.0, 8.0, 20.0, 12.5),
        (30.0, 2.0, 8.0, 20.0, 7.5),
        (10.0, 2.0, 0.0, None, 0.0),
    ],
)
def test_the_time_left(elapsed: float, done: float, rest: float, budget: float | None, left: float | None) -> None:
    assert time_left(elapsed, done, rest, budget) == left
