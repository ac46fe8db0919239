"""Tiny studies that really train: resumed, in several processes, and with a training that breaks down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.lab.paper.made_up import TINY

from flatwise.errors import TrainingError
from flatwise.lab.paper import runner
from flatwise.lab.paper.findings import find
from flatwise.lab.paper.runner import Place, collect, run_study, wall_seconds, work
from flatwise.lab.paper.study import Arm, Claim, Setting, Study
from flatwise.lab.paper.tasks import result_of
from flatwise.lab.paper.verdicts import Verdict
from flatwise.lab.train.config import TrainConfig

SGD = Arm("SGD", {"method": "base"}, ({"lr": 0.05}, {"lr": 0.1}), twice=True)
SAM = Arm("SAM", {"method": "sam"}, ({"rho": 0.05}, {"rho": 0.1}))
STUDY = Study(
    "tiny", "Tiny", "Table 0", (Setting("digits", TINY, (SGD, SAM)),), (Claim("c", "w", "SAM", "SGD"),),
    seeds=(0, 1), tuning_seeds=(100,),
)  # fmt: skip
TRAININGS = 2 + 2 * 2 + 2 + 2


def place(folder: Path, workers: int = 1) -> Place:
    return Place(folder, workers, shown=False)


def numbers(record: Any) -> list[Any]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in record.lines]


def test_a_study_runs_and_a_second_time_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_study(STUDY, place(tmp_path))
    assert len(first.lines) == TRAININGS
    assert find(first).claims[0].verdict in set(Verdict) - {Verdict.MISSING}
    assert wall_seconds(STUDY, place(tmp_path)) > 0
    monkeypatch.setattr(runner, "perform", None)  # would fail if anything were left to do
    assert numbers(run_study(STUDY, place(tmp_path))) == numbers(first) == numbers(collect(STUDY, place(tmp_path)))


def test_a_study_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_study(STUDY, place(tmp_path / "whole"))
    count, real = [0], runner.perform

    def stopping(task: Any, send: Any) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        real(task, send)

    monkeypatch.setattr(runner, "perform", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, place(tmp_path / "stopped"))
    assert len(collect(STUDY, place(tmp_path / "stopped")).lines) == 3
    again = run_study(STUDY, place(tmp_path / "stopped"))
    assert numbers(again) == numbers(whole)
    assert count[0] == TRAININGS + 1  # the one that was stopped, and every one once


def test_processes_of_their_own_give_the_same_numbers(tmp_path: Path) -> None:
    alone, together = run_study(STUDY, place(tmp_path / "a")), run_study(STUDY, place(tmp_path / "b", workers=2))
    assert numbers(together) == numbers(alone)


def test_a_training_whose_loss_is_not_finite_is_a_result_and_the_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatwise.lab.paper import tasks

    real = tasks.train

    def breaking(config: TrainConfig, on_epoch: Any) -> Any:
        if config.rho == 0.1:
            raise TrainingError("the loss is nan in step 1")
        return real(config, on_epoch)

    monkeypatch.setattr(tasks, "train", breaking)
    made = run_study(STUDY, place(tmp_path))
    broken = [line for line in made.lines if line["test_accuracy"] is None]
    assert [(line["stage"], line["choice"]["rho"]) for line in broken] == [("tuning", 0.1)]
    assert made.choice("digits", "SAM")["rho"] == 0.05


def test_studies_share_trainings(tmp_path: Path) -> None:
    run_study(STUDY, place(tmp_path))
    other = replace(STUDY, name="other", settings=(Setting("digits", TINY, (SGD,)),))
    assert len(collect(other, place(tmp_path)).lines) == 6


def test_result_of_an_unfinished_training_is_none(tmp_path: Path) -> None:
    assert result_of(TrainConfig(out=str(tmp_path))) is None


@pytest.mark.parametrize(
    ("changes", "passes"),
    [({"method": "base"}, 1), ({"method": "sam"}, 2), ({"method": "msam"}, 1), ({"method": "sam", "m": 256}, 2),
     ({"method": "multi-step:ascent_steps=5"}, 6), ({"method": "sam:window=(0.75, 1.0)"}, 1.25)],
)  # fmt: skip
def test_work_counts_gradients(changes: dict[str, Any], passes: float) -> None:
    assert work(TrainConfig(epochs=1, train_size=1000, **changes)) == passes
