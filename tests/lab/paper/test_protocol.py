"""The protocol: what is chosen, by what, for whom, and in which order trainings appear."""

from __future__ import annotations

from typing import Any

import pytest
from tests.lab.paper.made_up import AGAIN, BASE, RADII, SAM, TINY, fake, record, result, study, whole_plan

from flatwise.lab.paper.protocol import HELD_OUT, choose, held_out
from flatwise.lab.paper.study import Arm, Setting


def chosen(runs: list[Any], arm: str) -> list[Any]:
    return [run for run in runs if run.arm == arm and run.stage == "final"]


def test_the_best_on_the_held_out_tenth_is_chosen_and_of_equal_ones_the_first() -> None:
    assert choose([[0.5, 0.6], [0.7, 0.7], [0.9, 0.3]]) == 1
    assert choose([[0.5], [0.5]]) == 0


def test_rho_is_chosen_by_held_out_accuracy() -> None:
    runs = whole_plan(study(), fake({0.1: 0.6, 0.2: 0.8, 0.4: 0.7}))
    assert {run.config.rho for run in chosen(runs, "SAM")} == {0.2}


@pytest.mark.parametrize("best", [0.1, 0.2, 0.4])
def test_no_test_accuracy_can_change_a_choice(best: float) -> None:
    tests = {rho["rho"]: 0.99 if rho["rho"] == best else 0.01 for rho in RADII}
    scores = {0.1: 0.6, 0.2: 0.8, 0.4: 0.7}
    assert whole_plan(study(), fake(scores, tests)) == whole_plan(study(), fake(scores))


def test_a_test_accuracy_is_not_even_read() -> None:
    def finished(config: Any) -> Any:
        class Blind(dict[str, Any]):
            def __getitem__(self, key: str) -> Any:
                assert not key.startswith("test"), key
                return super().__getitem__(key)

            def get(self, key: str, default: Any = None) -> Any:
                assert not key.startswith("test"), key
                return super().get(key, default)

        return Blind(result(0.5))

    assert whole_plan(study(), finished)


def test_the_better_base_is_chosen_by_held_out_accuracy_even_where_the_test_says_otherwise() -> None:
    accuracies = {"SGD": [0.9, 0.9, 0.9], "SGD twice": [0.1, 0.1, 0.1], "SAM": [0.5], "Bootstrap + SAM": [0.5]}
    made = record(study(), accuracies, held={"SGD": 0.6, "SGD twice": 0.7})
    assert made.values("40 %", "SGD") == [0.1, 0.1, 0.1]
    assert made.choice("40 %", "SGD")["epochs"] == 4
    assert record(study(), accuracies, held={"SGD": 0.7, "SGD twice": 0.6}).values("40 %", "SGD") == [0.9] * 3


def test_learning_rate_is_chosen_for_the_base_and_taken_over_by_all() -> None:
    def finished(config: Any) -> Any:
        # SAM itself would like the other rate better: it is not asked.
        return result(0.9 if (config.lr == 0.2) == (config.method == "base") else 0.1)

    runs = whole_plan(study(), finished)
    assert {run.config.lr for run in runs if run.arm != "SGD"} == {0.2}
    assert {run.config.lr for run in chosen(runs, "SGD")} == {0.2}
    assert {run.config.lr for run in runs if run.arm == "SGD" and run.stage == "tuning"} == {0.1, 0.2}


def test_choosing_and_reporting_use_different_seeds_and_the_same_tenth_is_held_out() -> None:
    runs = whole_plan(study(), fake({}))
    tuning = {run.config.seed for run in runs if run.stage == "tuning"}
    reported = {run.config.seed for run in runs if run.stage != "tuning"}
    assert tuning == {100, 101}
    assert reported == {0, 1, 2}
    assert {run.config.val_fraction for run in runs} == {HELD_OUT}


def test_the_base_also_runs_for_twice_the_epochs_and_nobody_else_does() -> None:
    runs = whole_plan(study(), fake({}))
    assert {(run.arm, run.config.epochs) for run in runs if run.stage == "twice"} == {("SGD", 4)}
    assert {run.config.epochs for run in runs if run.stage != "twice"} == {2}


def test_a_plan_grows_as_trainings_finish() -> None:
    done: dict[str, Any] = {}

    def finished(config: Any) -> Any:
        return done.get(config.folder_name())

    sizes = []
    while True:
        runs = whole_plan(study(), finished)
        pending = [run for run in runs if finished(run.config) is None]
        if not pending:
            break
        sizes.append(len(pending))
        done |= {run.config.folder_name(): result(0.5) for run in pending}
    # The base's candidates; then its own trainings, once and twice, with SAM's candidates; then SAM; then its pupil.
    assert sizes == [2 * 2, 2 * 3 + 3 * 2, 3, 3]


def test_a_bootstrap_learns_from_the_training_of_its_own_seed() -> None:
    runs = whole_plan(study(), fake({0.2: 0.9}))
    teachers = {run.config.seed: run.config for run in chosen(runs, "SAM")}
    for pupil in chosen(runs, "Bootstrap + SAM"):
        assert pupil.config.labels_from == f"out/{teachers[pupil.config.seed].folder_name()}"
        assert pupil.config.rho == 0.2


def test_a_training_that_broke_down_is_never_chosen() -> None:
    assert held_out({"broken": "the loss is nan"}) == -1.0
    assert held_out({"validation_accuracy": float("nan")}) == -1.0
    assert held_out({"history": [{"validation_accuracy": 0.3}, {"validation_accuracy": 0.4}]}) == 0.4


def test_the_seed_reaches_a_method_that_draws() -> None:
    noisy = Arm("random", {"method": "random:filter_scaled=False:noise_seed={seed}"}, ({"rho": 0.1},))
    runs = whole_plan(study(settings=(Setting("a", TINY, (BASE, noisy)),)), fake({}))
    assert [run.config.method.rpartition("=")[2] for run in chosen(runs, "random")] == ["0", "1", "2"]


def test_one_setting_can_be_asked_for() -> None:
    from pathlib import Path

    from flatwise.lab.paper.protocol import plan

    two = study(settings=(Setting("a", TINY, (BASE, SAM, AGAIN)), Setting("b", TINY, (BASE,))))
    assert {run.setting for run in plan(two, fake({}), Path("out"), ["b"])} == {"b"}
