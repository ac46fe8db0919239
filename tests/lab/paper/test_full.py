"""Rows of the paper at full size: which trainings, compared with what, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.lab.paper.made_up import TINY

from flatwise.cli import main
from flatwise.lab.paper import full, reproduce
from flatwise.lab.paper.full import Place, full_grid, paper_name, printed, reference, trainings, values_of
from flatwise.lab.paper.rows import Run


@pytest.mark.parametrize(
    ("word", "name"), [("table4", "4"), ("4", "4"), ("late-phase", "late"), ("c5", "c5"), ("spectra", "spectra")]
)
def test_both_ways_to_name_a_table(word: str, name: str) -> None:
    assert paper_name(word) == name


def test_a_row_has_its_trainings_for_each_seed() -> None:
    found = trainings("1", "wrn28-10-basic", 2, Path("out"), "data")
    assert {(run.cell, run.role, run.seed) for run in found} == {
        (cell, role, seed) for cell in ("cifar10", "cifar100") for role in ("sam", "base", "base-2x") for seed in (0, 1)
    }
    assert {(run.config.model, run.config.data_root) for run in found} == {("wrn-28-10", "data")}


@pytest.mark.parametrize(
    ("name", "place", "text"),
    [
        ("1", Place("wrn28-10-basic", "cifar10", "sam"), "2.7±0.1"),
        ("1", Place("wrn28-10-basic", "cifar10", "base-2x"), "3.5±0.1"),
        ("2", Place("resnet50-100", "imagenet", "sam"), "22.5±0.1"),
        ("4", Place("mixup", "40", "mixup-8"), "90.0"),
        ("4", Place("bootstrap-sam", "40", "bootstrap-sam"), "94.2"),
        ("4", Place("bootstrap-sam", "40", "first"), None),
        ("8", Place("0.1", "40", "bootstrap-sam"), "6.0"),
        ("8", Place("0.1", "40", "first"), None),
        ("11", Place("2", "cifar10", "sam"), "2.76±0.03"),
        ("c5", Place("p2", "0.1", "p2"), None),
        ("late", Place("late", "cifar10", "late"), None),
    ],
)
def test_the_papers_number_is_found(name: str, place: Place, text: str | None) -> None:
    assert printed(name, place) == text


def test_the_better_of_the_two_bases_counts() -> None:
    values: Mapping[Place, Any] = {
        Place("a", "x", "base"): [3.0, 3.0],
        Place("a", "x", "base-2x"): [2.0, 2.0],
        Place("sgd", "y", "base"): [4.0, 4.0],
    }
    assert reference(Place("a", "x", "sam"), values, lower=True) == [2.0, 2.0]
    assert reference(Place("a", "x", "sam"), values, lower=False) == [3.0, 3.0]
    assert reference(Place("sam", "y", "sam"), values, lower=True) == [4.0, 4.0]
    assert reference(Place("a", "x", "base"), values, lower=True) is None
    assert reference(Place("sam", "z", "sam"), values, lower=True) is None


def test_nothing_is_compared_with_one_base_where_the_other_is_missing() -> None:
    values: dict[Place, Any] = {Place("a", "x", "base"): [3.0, 3.0], Place("a", "x", "base-2x"): None}
    assert reference(Place("a", "x", "sam"), values, lower=True) is None
    values = {Place("a", "x", "base"): None, Place("a", "x", "base-2x"): [3.0, 3.0]}
    assert reference(Place("a", "x", "sam"), values, lower=True) is None


def test_table_8_is_of_the_held_out_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "result_of", lambda config: {"test_accuracy": 0.5, "validation_accuracy": 0.9})
    by_table = {}
    for name, row in (("8", "0.1"), ("4", "sam")):
        values = values_of(trainings(name, row, 1, Path("out")), lower=True)
        by_table[name] = {round(found[0]) for found in values.values() if found is not None}
    assert by_table == {"8": {10}, "4": {50}}


def test_a_table_of_finished_and_missing_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = {"sam": [0.97, 0.972], "base": [0.96, 0.961], "base-2x": [0.95, 0.95]}

    def result_of(config: Any) -> Any:
        role = config.method if config.epochs == 200 else "base-2x"
        value = accuracies[role][config.seed]
        return None if config.dataset == "cifar100" else {"test_accuracy": value}

    monkeypatch.setattr(full, "result_of", result_of)
    grid = full_grid("1", trainings("1", "wrn28-10-basic", 2, Path("out")))
    lines = {(line[1], line[2]): line[3:] for line in grid.rows}
    assert lines["cifar10", "sam"][:2] == ("2.7±0.1", "2.9 ± 1.3")
    assert lines["cifar10", "sam"][2].startswith("-1.05 ± 0.6")
    assert lines["cifar10", "sam"][3] == "better: confirmed"
    assert lines["cifar10", "base"][2:] == ("–", "–")
    assert lines["cifar100", "sam"][1] == "missing"


def test_a_row_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def tiny(name: str, row: str, cell: str | None = None, *, out: str) -> list[Run]:
        config = {**TINY, "out": out, "tracker": "none", "quiet": True}
        from flatwise.lab.train.config import TrainConfig

        base = Run(name, row, "20", "base", 0, TrainConfig(**{**config, "method": "base"}))
        return [base, replace(base, role="sam", config=TrainConfig(**{**config, "method": "sam", "rho": 0.05}))]

    monkeypatch.setattr(full, "runs", tiny)
    words = ["reproduce", "table4", "sam", "--scale", "full", "--out", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "2 of 2 trainings" in shown.err
    assert "| sam | 20 | sam | 95.1 |" in shown.out
    assert (tmp_path / "records" / "full-4.json").exists()
    monkeypatch.setattr(full, "train", None)  # would fail if anything were left to do
    assert main(words) == 0


def test_the_list_says_what_a_row_needs(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(reproduce, "measure_step", lambda config: full)
    monkeypatch.setattr(reproduce, "needs", lambda name, row, measure: (name, row, measure is not None))
    monkeypatch.setattr(reproduce, "needs_table", lambda rows: f"needs {rows}")
    assert main(["reproduce", "table4", "sam", "--list"]) == 0
    assert capsys.readouterr().out == "needs [('4', 'sam', True)]\n"
    monkeypatch.setattr(reproduce, "all_needs", lambda measure: [measure])
    assert main(["reproduce", "--list"]) == 0
    assert capsys.readouterr().out.startswith("needs [")
    assert main(["reproduce", "tabel4", "--list"]) == 2
    assert "table of the paper" in capsys.readouterr().err
