"""What the board makes of finished trainings: the choice by validation, the verdicts, the front, the pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flatwise.lab.board.page import BEGIN, write_page
from flatwise.lab.board.plan import BASE, LONGER, Task, entries
from flatwise.lab.board.store import Store
from flatwise.lab.board.summary import Row, front, rows_of
from flatwise.report.board import Curve, Dot, draw_costs, draw_radii

from .test_board import TASK, result

SEEDS = 3


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """SGD at 0.7; sam best by validation at its middle radius, by test at its largest; asam worse than SGD."""
    store = Store(tmp_path / "docs" / "board")
    fill(store, BASE, [(0.70, 0.70)], gradients=1.0)
    fill(store, LONGER, [(0.75, 0.75)], gradients=1.0)
    fill(store, "sam", [(0.71, 0.71), (0.80, 0.90), (0.85, 0.80)])
    fill(store, "asam", [(0.60, 0.80), (0.50, 0.80), (0.40, 0.70)])
    fill(store, "late", [(0.700, 0.7), (0.701, 0.7), (0.702, 0.8)], gradients=1.1)
    step = {"quartiles": [1.0, 1.0], "step_seconds": 0.1, "gradients": 2.0}
    timing = {name: {"ratio": 2.0, **step} for name in ("sam", "asam", "late")}
    timing[BASE] = {"ratio": 1.0, **step, "gradients": 1.0}
    environment = {"processor": "a processor", "packages": {"torch": "2"}}
    store.write(TASK, "timing", {"methods": timing, "environment": environment})
    return store


def fill(store: Store, method: str, scores: Sequence[tuple[float, float]], gradients: float = 2.0) -> None:
    for entry, (test, validation) in zip(entries(TASK, method), scores, strict=True):
        for seed in range(SEEDS):
            # The seeds differ, by the same amount for every method; a little of it is the method's own.
            own = 0.002 * (seed - 1) * (method != BASE)
            run = result(seed, test + 0.02 * seed + own, validation, gradients)
            store.add(TASK, entry, run, "torch")


def by_name(store: Store, task: Task = TASK) -> dict[str, Row]:
    return {row.method: row for row in rows_of(task, [BASE, LONGER, "sam", "asam", "late", "msam"], store)}


def test_validation_chooses_the_radius_not_the_test_set(store: Store) -> None:
    rows = by_name(store)
    assert set(rows) == {BASE, LONGER, "sam", "asam", "late"}
    sam = rows["sam"].best
    assert (sam.rho, sam.validation) == (0.05, 0.90)
    assert sam.test.mean == pytest.approx(0.82)
    # At a tie the smaller radius.
    assert rows["asam"].best.rho == 0.2
    assert [rows[name].edge for name in (BASE, "sam", "asam", "late")] == ["", "", "smallest", "largest"]


def test_the_difference_is_paired_and_decides_the_verdict(store: Store) -> None:
    rows = by_name(store)
    difference = rows["sam"].best.difference
    assert difference is not None
    assert difference.mean == pytest.approx(0.1)
    # Two thousandths from seed to seed, not the two hundredths that all methods share.
    assert difference.ci95 == pytest.approx(4.303 * 0.002 / 3**0.5, rel=1e-3)
    verdicts = {name: row.verdict for name, row in rows.items()}
    assert verdicts == {BASE: "", LONGER: "better", "sam": "better", "asam": "worse", "late": "open"}


def test_a_row_stands_on_seeds_that_all_its_radii_and_the_base_have(store: Store) -> None:
    for entry in entries(TASK, "msam")[:2]:
        store.add(TASK, entry, result(0), "torch")
    assert "msam" not in by_name(store)
    store.add(TASK, entries(TASK, "msam")[2], result(0), "torch")
    store.add(TASK, entries(TASK, "msam")[2], result(7), "torch")  # a seed that nothing else has
    assert by_name(store)["msam"].seeds == 1
    assert by_name(store)["msam"].verdict == "open"


def test_costs_are_those_of_the_training_and_the_front_is_what_nothing_beats(store: Store) -> None:
    rows = by_name(store)
    costs = {name: row.cost for name, row in rows.items()}
    assert costs == pytest.approx({BASE: 1.0, LONGER: 2.0, "sam": 2.0, "asam": 2.0, "late": 1.1})
    assert [row.method for row in front(list(rows.values()))] == [BASE, "late", "sam"]


def test_the_page_says_who_loses_to_sgd(store: Store, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "methods.md"
    page.write_text(BEGIN)
    write_page([TASK], store, page)
    text = page.read_text()
    assert "**Worse than plain SGD here:** `asam`." in text
    assert "includes 0: `late`." in text
    assert "Mean below SGD with twice the epochs: `late`, `asam`." in text
    assert "| **sam** ◆ | 0.05 | 82.0 ± " in text
    assert "| asam | 0.2 ↓ |" in text
    assert "`sam` (9 of 15 trainings done)" in text
    assert "`msam`," in text
    for name in ("cost.png", "rho.png"):
        assert f"(board/{name})" in text
        assert (store.folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig

    def watched(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def test_names_do_not_lie_on_each_other(drawn: list[Figure]) -> None:
    # Eight methods at nearly the same cost and accuracy.
    dots = [Dot(f"method-{n}", 2 + 0.01 * n, 80 + 0.2 * n, 1.0, n == 7) for n in range(8)]
    draw_costs([("task", [*dots, Dot("sgd", 1, 70, 1.0, True)])], io.BytesIO(), subtitle="bars")
    (axes,) = drawn[0].axes
    assert {text.get_text() for text in axes.texts} == {"sgd", *(dot.label for dot in dots)}
    # An annotation's own extent covers its arrow too.
    boxes = [super(type(text), text).get_window_extent(axes.figure.canvas.get_renderer()) for text in axes.texts]
    pairs = [(one, other) for number, one in enumerate(boxes) for other in boxes[:number]]
    assert not any(one.padded(-1).overlaps(other.padded(-1)) for one, other in pairs)


def test_a_task_has_one_colour_in_every_panel(drawn: list[Figure]) -> None:
    def curve(task: str) -> Curve:
        return Curve(task, [0.1, 0.2, 0.5], [1.0, 2.0, 3.0], [0.5, 0.5, 0.5], 2)

    draw_radii([("sam", [curve("a"), curve("b")]), ("asam", [curve("b")])], io.BytesIO(), subtitle="bars")
    left, right = (axes for axes in drawn[0].axes if axes.get_visible())
    colours = [line.get_color() for line in right.get_lines()[1:]]
    assert set(colours) == {[line.get_color() for line in left.get_lines()][-1]}
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]
