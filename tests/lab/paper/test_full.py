"""Rows of the paper at full size: which trainings, compared with what, and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.lab.paper.made_up import TINY

from flatwise.cli import main
from flatwise.errors import TrainingError, UserError
from flatwise.lab.paper import full, full_quantities, full_table, reproduce
from flatwise.lab.paper.experiments import experiment, experiment_names
from flatwise.lab.paper.full import beside, paper_name, run_full, trainings
from flatwise.lab.paper.full_quantities import quantities_of
from flatwise.lab.paper.full_table import Found, Place, full_grid, printed, reference, values_of
from flatwise.lab.paper.rows import Run, runs
from flatwise.lab.paper.tables import table, table_names
from flatwise.lab.train.config import TrainConfig


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
    assert printed(name, place, quantities_of(name)[0]) == text


@pytest.mark.parametrize(
    ("name", "place", "texts"),
    [
        ("2", Place("resnet101-400", "imagenet", "base"), ["22.3±0.1", "6.41±0.06"]),
        ("11", Place("5", "cifar100", "sam"), ["16.60±0.06", "2.82±0.04"]),
        ("spectra", Place("sgd", "cifar10", "base"), [None, "62.9", "2.5", "12.5", "1.7", "24.2", "11.4"]),
        ("c4", Place("sam", "cifar10", "sam"), [None, None, None]),
    ],
)
def test_every_column_of_the_table_is_a_quantity(name: str, place: Place, texts: list[str | None]) -> None:
    assert [printed(name, place, quantity) for quantity in quantities_of(name)] == texts


@pytest.mark.parametrize("name", [name for name in experiment_names() if name in table_names()])
def test_each_printed_number_of_a_table_has_a_line(name: str) -> None:
    """Else a row could be run, and a column of it never be filled."""
    held = set()
    for row in experiment(name).rows:
        for place in {Place(run.row, run.cell, run.role) for run in runs(name, row)}:
            held |= {(row, printed(name, place, quantity)) for quantity in quantities_of(name)}
    quoted = {"b7/previous", "l2/previous", "b7/tuned"}  # of other papers, and of Table 3
    for (row, column), number in table(name).numbers.items():
        if row in experiment(name).rows and column not in quoted:
            assert (row, number.printed) in held, (row, column)


def found(**values: list[float] | None) -> dict[Place, Found]:
    """Make values by place, written row__cell__role."""
    places = {Place(*word.split("__")): row for word, row in values.items()}
    return {place: Found(None if row is None else tuple(row)) for place, row in places.items()}


def test_the_better_of_the_two_bases_counts() -> None:
    values = found(a__x__base=[3.0, 3.0], a__x__base2=[], sgd__y__base=[4.0], sgd__x__base=[9.0])
    values[Place("a", "x", "base-2x")] = Found((2.0, 2.0))
    assert reference("1", Place("a", "x", "sam"), values, lower=True) == Place("a", "x", "base-2x")
    assert reference("1", Place("a", "x", "sam"), values, lower=False) == Place("a", "x", "base")
    assert reference("4", Place("sam", "y", "sam"), values, lower=True) == Place("sgd", "y", "base")
    assert reference("1", Place("a", "x", "base"), values, lower=True) is None
    assert reference("4", Place("sam", "z", "sam"), values, lower=True) is None
    # The trainings of the base are the same for every radius, and stand at the first.
    one = found(sgd__5__base=[4.0])
    assert reference("m", Place("16", "7", "sam"), one, lower=True) == Place("sgd", "5", "base")


def test_rows_that_are_not_compared_with_sgd() -> None:
    values = {Place(row, "20", role): Found((1.0,)) for row in ("0", "0.1") for role in ("first", "bootstrap-sam")}
    place = Place("0.1", "20", "bootstrap-sam")
    assert reference("8", place, values, lower=True) == replace(place, row="0")
    assert reference("8", replace(place, row="0"), values, lower=True) is None
    values = {Place(row, "cifar10", "sam"): Found((1.0,)) for row in ("1", "2")}
    assert reference("11", Place("2", "cifar10", "sam"), values, lower=True) == Place("1", "cifar10", "sam")
    values = {Place(row, "cifar10", row): Found((1.0,)) for row in ("sam", "second-order")}
    second = Place("second-order", "cifar10", "second-order")
    assert reference("c4", Place("sam", "cifar10", "sam"), values, lower=True) == second


@pytest.mark.parametrize("missing", ["base", "base-2x"])
def test_nothing_is_compared_with_one_base_where_the_other_is_missing(missing: str) -> None:
    values = {Place("a", "x", role): Found(None if role == missing else (3.0,)) for role in ("base", "base-2x")}
    assert reference("1", Place("a", "x", "sam"), values, lower=True) == Place("a", "x", missing)


def test_table_8_is_of_the_held_out_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_quantities, "result_of", lambda config: {"test_accuracy": 0.5, "validation_accuracy": 0.9})
    by_table = {}
    for name, row, claim in (("8", "0.1", "lower"), ("4", "sam", "higher")):
        quantity = quantities_of(name)[0]
        assert quantity.claim == claim
        values = values_of(trainings(name, row, 1, Path("out")), quantity)
        by_table[name] = {round(known.values[0]) for known in values.values() if known.values is not None}
    assert by_table == {"8": {10}, "4": {50}}


Fake = Callable[[Callable[[TrainConfig], Any]], None]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Fake:
    def use(result_of: Callable[[TrainConfig], Any]) -> None:
        for module in (full, full_table, full_quantities):
            monkeypatch.setattr(module, "result_of", result_of)

    return use


def lines_of(name: str, row: str, seeds: int = 2) -> dict[tuple[str, str, str], tuple[str, ...]]:
    out = Path("out")
    grid = full_grid(name, trainings(name, row, seeds, out), beside(name, row, seeds, out))
    return {(line[1], line[2], line[3]): line[4:] for line in grid.rows}


def test_a_table_of_finished_and_missing_trainings(results: Fake) -> None:
    accuracies = {"sam": [0.97, 0.972], "base": [0.96, 0.961], "base-2x": [0.95, 0.95]}

    def result_of(config: TrainConfig) -> Any:
        role = config.method if config.epochs == 200 else "base-2x"
        cost = {"gradient_evaluations_per_step": 2.0 if role == "sam" else 1.0, "seconds": 5400.0}
        return None if config.dataset == "cifar100" else {"test_accuracy": accuracies[role][config.seed], **cost}

    results(result_of)
    lines = lines_of("1", "wrn28-10-basic")
    sam = lines["cifar10", "sam", "error, %"]
    assert sam[:2] == ("2.7±0.1", "2.9 ± 1.3")
    assert sam[2].startswith("-1.05 ± 0.6")
    assert sam[3:] == ("better: confirmed", "2.00", "1.50")
    assert lines["cifar10", "base", "error, %"][2:] == ("–", "–", "1.00", "1.50")
    assert lines["cifar100", "sam", "error, %"][1:] == ("missing", "missing: wrn28-10-basic, base", "missing", "–", "–")


def test_a_row_alone_is_compared_with_the_row_of_sgd(results: Fake) -> None:
    results(lambda config: {"test_accuracy": (0.9 if config.method == "sam" else 0.8) + config.seed / 1000})
    assert lines_of("4", "sam")["40", "sam", "accuracy, %"][2:4] == ("10", "better: confirmed")
    assert {line[3] for (_, _, name), line in lines_of("m", "16").items() if name == "error, %"} == {
        "better: confirmed"
    }
    results(lambda config: {"test_accuracy": 0.9} if config.method == "sam" else None)
    assert lines_of("4", "sam")["40", "sam", "accuracy, %"][2:4] == ("missing: sgd, base", "missing")


def test_where_the_papers_sam_loses_that_is_the_claim(results: Fake) -> None:
    results(lambda config: {"test_accuracy": (0.9 if config.method == "sam" else 0.8) + config.seed / 1000})
    lines = lines_of("5", "shakeshake-autoaugment")
    assert lines["svhn", "sam", "error, %"][3] == "worse: not confirmed"
    assert lines["fashion-mnist", "sam", "error, %"][3] == "better: confirmed"


def test_more_steps_are_claimed_to_change_little(results: Fake) -> None:
    results(lambda config: {"test_accuracy": 0.9 + config.seed / 1000})
    assert lines_of("11", "5")["cifar10", "sam", "error, %"][3] == "the same to 0.2: confirmed"
    assert lines_of("11", "5")["cifar10", "sam", "sharpness"][1:2] == ("missing",)


def test_a_training_that_broke_down_is_a_result_and_the_next_begins(
    results: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wanted = trainings("c5", "p2", 1, tmp_path)[-2:]

    def breaks(config: TrainConfig) -> None:
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(full, "train", breaks)
    run_full("c5", wanted, shown=True)
    assert capsys.readouterr().err.count("the loss is nan") == 2
    assert {line[5] for line in full_grid("c5", wanted).rows} == {"1 of 1 broke down"}
    monkeypatch.setattr(full, "train", None)  # would fail if they were begun again
    run_full("c5", wanted, shown=False)


def test_rho_is_chosen_anew_on_the_held_out_tenth(results: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    # The best is another for each cell, and the test accuracy, which says otherwise, is not looked at.
    def result_of(config: TrainConfig) -> Any:
        best = 0.2 if config.dataset == "cifar10" else 0.02
        right = config.rho == best and config.val_fraction == 0.1
        return {"validation_accuracy": 0.9 if right else 0.5, "test_accuracy": 0.1 if right else 0.9}

    results(result_of)
    found = trainings("1", "wrn28-10-basic", 2, Path("out"), "data", tune=True)
    assert {(run.cell, run.role, run.config.rho) for run in found if run.role == "sam"} == {
        ("cifar10", "sam", 0.2), ("cifar100", "sam", 0.02),
    }  # fmt: skip
    assert {(run.config.val_fraction, run.config.data_root) for run in found} == {(0.0, "data")}
    assert {run.config.rho for run in found if run.role != "sam"} == {None}
    # A bootstrap takes over the radius of its first training, and the labels of that very one.
    again = trainings("4", "bootstrap-sam", 1, Path("out"), tune=True)
    assert {run.config.rho for run in again} == {0.2}
    firsts = {run.config.folder_name() for run in again if run.role == "first"}
    assert {Path(run.config.labels_from or "").name for run in again if run.role != "first"} == firsts
    assert trainings("4", "mixup", 1, Path("out"), tune=True) == trainings("4", "mixup", 1, Path("out"))
    with pytest.raises(UserError, match="table 9 is about rho or fixes it"):
        trainings("9", "wrn28-10-basic", 1, Path("out"), tune=True)


def test_without_a_number_the_papers_seeds_run() -> None:
    assert len({run.seed for run in trainings("11", "2", None, Path("out"))}) == 20
    assert len({run.seed for run in trainings("1", "wrn28-10-basic", None, Path("out"))}) == 5


def test_a_row_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def tiny(name: str, row: str, cell: str | None = None, *, out: str, rho: Any = None) -> list[Run]:
        config = {**TINY, "out": out, "tracker": "none", "quiet": True}
        base = Run(name, row, "20", "base", 0, TrainConfig(**{**config, "method": "base"}))
        return [base, replace(base, role="sam", config=TrainConfig(**{**config, "method": "sam", "rho": 0.05}))]

    monkeypatch.setattr(full, "runs", tiny)
    words = ["reproduce", "table4", "sam", "--scale", "full", "--out", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "2 of 2 trainings" in shown.err
    assert "| sam | 20 | sam | accuracy, % | 95.1 |" in shown.out
    assert "The paper's claim: SAM is far above SGD" in shown.out
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


def test_what_a_table_has_beside_the_error_is_measured_when_the_trainings_have_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**TINY, "out": str(tmp_path), "tracker": "none", "quiet": True, "rho": 0.05}
    wanted = [
        Run("11", row, "cifar10", "sam", 0, TrainConfig(**{**fields, "method": f"sam:ascent_steps={row}"}))
        for row in ("1", "5")
    ]
    run_full("11", wanted, shown=False)
    lines = {(line[0], line[3]): line[4:8] for line in full_grid("11", wanted).rows}
    for row, text in (("1", "0.17±0.03"), ("5", "2.26±0.05")):
        assert lines[row, "sharpness"][0] == text
        assert float(lines[row, "sharpness"][1]) > 0
    assert lines["5", "sharpness"][3] == "higher: not decided"  # one seed
    monkeypatch.setattr(full, "measure_trained", None)  # would fail if anything were measured twice
    run_full("11", wanted, shown=False)
    full.write_full(tmp_path / "record.json", "11", wanted)
    assert "sharpness_own_steps" in (tmp_path / "record.json").read_text()
