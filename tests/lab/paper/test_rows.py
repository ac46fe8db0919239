"""The trainings behind each row: the paper's protocol, counted by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from flatwise.errors import UserError
from flatwise.lab.paper.experiments import experiment, experiment_names
from flatwise.lab.paper.rows import configs, rho_search, runs
from flatwise.lab.paper.tables import table
from flatwise.lab.recipes import load_recipe
from flatwise.lab.train.config import train_config_from

FIVE = {0, 1, 2, 3, 4}


def test_a_cell_of_table_1_is_sam_the_base_and_the_base_twice_as_long_five_times_each() -> None:
    found = runs("1", "shakeshake-cutout", "cifar100")
    sam = train_config_from(load_recipe("cifar100-shakeshake-cutout-sam"))
    base = train_config_from(load_recipe("cifar100-shakeshake-cutout-sgd"))
    wanted = {"sam": sam, "base": base, "base-2x": replace(base, epochs=3600)}
    assert [(run.role, run.seed) for run in found] == [(role, seed) for role in wanted for seed in range(5)]
    for run in found:
        assert run.config == replace(wanted[run.role], seed=run.seed)
        assert (run.table, run.row, run.cell) == ("1", "shakeshake-cutout", "cifar100")


@pytest.mark.parametrize("name", experiment_names())
def test_every_row_of_every_table_has_its_runs(name: str) -> None:
    made = experiment(name)
    for row in made.rows:
        found = runs(name, row)
        assert {run.seed for run in found} == (set(range(20)) if name == "11" else FIVE)
        assert len({run.config for run in found}) == len(found)
        assert len({run.config.folder_name() for run in found}) == len(found)
        assert configs(name, row) == [run.config for run in found]


@pytest.mark.parametrize("name", ["1", "3", "5", "9", "10", "11"])
def test_the_rows_and_cells_are_those_of_the_printed_table(name: str) -> None:
    assert experiment(name).rows == table(name).rows
    assert experiment(name).cells == table(name).cells


def test_the_rows_that_can_be_run_are_the_authors_own() -> None:
    assert set(experiment("4").rows) < set(table("4").rows)
    assert experiment("4").cells == table("4").columns == experiment("8").cells
    assert experiment("2").rows == table("2").rows
    assert experiment("2").same_runs == table("2").cells
    assert experiment("spectra").same_runs == table("spectra").cells
    assert set(experiment("spectra").rows) == set(table("spectra").rows)


def test_imagenet_prints_its_lengths_and_both_errors_come_from_the_same_runs() -> None:
    found = runs("2", "resnet50-200")
    assert Counter(run.role for run in found) == {"sam": 5, "base": 5}
    assert {run.config.epochs for run in found} == {200}
    assert configs("2", "resnet50-200", "top5") == configs("2", "resnet50-200", "top1") == [r.config for r in found]


def test_fine_tuning_doubles_the_steps_and_imagenet_the_epochs() -> None:
    steps = {run.role: run.config.steps for run in runs("3", "flowers", "l2")}
    assert steps == {"sam": 10_000, "base": 10_000, "base-2x": 20_000}
    epochs = {run.role: (run.config.steps, run.config.epochs) for run in runs("3", "imagenet", "b7")}
    assert epochs == {"sam": (None, 10), "base": (None, 10), "base-2x": (None, 20)}


def test_bootstrapping_learns_from_the_run_of_the_same_seed(tmp_path: Path) -> None:
    for row, name in (("bootstrap-sam", "sam"), ("bootstrap-mixup", "mixup")):
        found = runs("4", row, "80", out=str(tmp_path))
        firsts = {run.seed: run.config for run in found if run.role == "first"}
        seconds = {run.seed: run.config for run in found if run.role == row}
        assert [run.role for run in found] == ["first"] * 5 + [row] * 5  # in the order in which they can be run
        plain = train_config_from(load_recipe(f"cifar10-resnet32-noise80-{name}"))
        for seed in range(5):
            assert firsts[seed] == replace(plain, seed=seed, out=str(tmp_path))
            teacher = str(tmp_path / firsts[seed].folder_name())
            assert seconds[seed] == replace(firsts[seed], labels_from=teacher)


def test_mixup_tries_each_alpha_and_noise_its_radius() -> None:
    assert {run.config.mixup for run in runs("4", "mixup", "20")} == {1.0, 8.0, 16.0, 32.0}
    assert {run.cell: run.config.rho for run in runs("4", "sam")} == {"20": 0.1, "40": 0.1, "60": 0.1, "80": 0.05}
    assert {run.role for run in runs("4", "sgd")} == {"base"}


def test_table_8_is_bootstrapped_sam_by_rho_on_a_held_out_tenth() -> None:
    found = runs("8", "0.2", "60")
    assert {(run.role, run.config.rho, run.config.val_fraction) for run in found} == {
        ("first", 0.2, 0.1), ("bootstrap-sam", 0.2, 0.1),
    }  # fmt: skip
    assert {run.config.rho for run in runs("8", "0")} == {0.0}


def test_fashion_mnists_auto_augment_is_cutout() -> None:
    assert {run.config.augment for run in runs("5", "wrn28-10-autoaugment", "fashion-mnist")} == {"basic+cutout"}
    assert {run.config.augment for run in runs("5", "wrn28-10-autoaugment", "svhn")} == {"autoaugment+cutout"}


def test_tables_9_and_10_differ_from_1_and_3_in_rho_alone() -> None:
    for first, second, row, cell in (("1", "9", "pyramidnet-basic", "cifar100"), ("3", "10", "pets", "b7")):
        for one, other in zip(runs(first, row, cell), runs(second, row, cell), strict=True):
            assert replace(one.config, rho=None) == replace(other.config, rho=None)
            assert other.config.rho == (0.05 if other.role == "sam" else None)
    assert {run.config.rho for run in runs("1", "pyramidnet-basic", "cifar100")} == {0.2, None}


def test_the_figures() -> None:
    assert {run.config.method for run in runs("11", "3")} == {"sam:ascent_steps=3"}
    assert {run.config.m for run in runs("m", "16")} == {16}
    assert {run.config.rho for run in runs("m", "16")} == {0.025, 0.05, 0.075, 0.1, 0.125, 0.15}
    assert len(runs("m", "sgd")) == 5  # once, not once for each radius
    # A Gaussian with deviation s in k dimensions is s * sqrt(k) long: the radius is the length, as the paper means it.
    (config,) = {replace(run.config, seed=0) for run in runs("c5", "random", "0.1")}
    assert config.rho == pytest.approx(0.1 / 36_479_194**0.5)
    assert {run.config.rho for run in runs("c5", "pinf", "0.001")} == {0.001}
    assert [float(cell) for cell in experiment("c5").cells] == [10.0**power for power in range(-6, 4)]
    assert {run.config.keep_epochs for run in runs("spectra", "sam", "300")} == {"1,50,300"}
    assert {run.config.rho for run in runs("msam", "msam")} == {None}
    assert {run.config.method for run in runs("late", "late")} == {"sam:window=(0.9,1.0)"}


def test_rho_is_chosen_on_a_held_out_tenth_with_a_seed_that_no_reported_run_has() -> None:
    found = rho_search("1", "wrn28-10-basic", "cifar100")
    assert [run.config.rho for run in found] == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    sam = train_config_from(load_recipe("cifar100-wrn28-10-sam"))
    for run in found:
        assert replace(run.config, rho=0.1, seed=0, val_fraction=0.0) == sam
        assert run.config.val_fraction == 0.1
        assert run.seed == run.config.seed
        assert run.seed not in FIVE
    assert len(rho_search("1", "wrn28-10-basic")) == 12
    with pytest.raises(UserError, match="no radius to choose"):
        rho_search("4", "mixup")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("12", "x"), "unknown table '12'"),
        (("1", "wrn28-10-basik"), "unknown row of table 1 'wrn28-10-basik'; did you mean 'wrn28-10-basic'?"),
        (("1", "wrn28-10-basic", "cifar1000"), "unknown cell of table 1 'cifar1000'; did you mean 'cifar100'?"),
    ],
)
def test_a_mistake_names_the_nearest(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as raised:
        runs(*words)
    assert message in str(raised.value)
