"""The search: which trials are begun, reported, stopped and told, and what is left when something goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from tests.lab.sweep_world import EPOCHS, FIXED, FakeTrain, config_in, height, states

from flatwise.errors import CannotWriteError, TrainingError, UserError
from flatwise.lab.sweep import SweepConfig, sweep
from flatwise.lab.sweep.results import finished, rows_of
from flatwise.lab.train import TrainConfig


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    fake = FakeTrain()
    monkeypatch.setattr("flatwise.lab.sweep.perform.train", fake)
    # Drawing takes most of the time; test_sweep_picture.py looks at it.
    monkeypatch.setattr("flatwise.lab.sweep.run.draw", lambda rows, path, **words: None)
    return fake


def chosen(config: TrainConfig) -> tuple[object, ...]:
    return config.method, config.rho, config.lr, config.weight_decay, config.seed


def test_every_trial_is_trained_as_it_says_and_the_best_comes_first(train: FakeTrain, tmp_path: Path) -> None:
    found = sweep(config_in(tmp_path, methods="base,sam,asam", trials=12))
    assert len(found.rows) == len(train.calls) == 12
    assert {row.method for row in found.rows} == {"base", "sam", "asam"}
    by_number = {row.number: row for row in found.rows}
    for number, config in enumerate(train.calls):
        row = by_number[number]
        assert (row.method, row.rho, row.lr, row.weight_decay) == chosen(config)[:4]
        assert row.accuracy == pytest.approx(height(config), abs=1e-12)
        assert row.accuracies == [row.accuracy]
        assert not row.pruned
        assert config.val_fraction == 0.1
        assert (config.epochs, config.train_size) == (EPOCHS, 200)
    heights = [row.accuracy for row in found.rows]
    assert heights == sorted(heights, reverse=True)


def test_the_search_learns(train: FakeTrain, tmp_path: Path) -> None:
    found = sweep(config_in(tmp_path, trials=40))
    early = [height(config) for config in train.calls[:10]]
    late = [height(config) for config in train.calls[-10:]]
    assert sum(late) / 10 > sum(early) / 10 + 0.1
    assert math.log10(found.rows[0].rho / 0.2) == pytest.approx(0, abs=0.2)


def test_the_test_set_is_not_looked_at(train: FakeTrain, tmp_path: Path) -> None:
    found = sweep(config_in(tmp_path))
    everything = (found.folder / "results.json").read_text() + (found.folder / "study.journal").read_text()
    assert "test_accuracy" not in everything


def test_the_same_seed_makes_the_same_search_and_another_seed_another(train: FakeTrain, tmp_path: Path) -> None:
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        sweep(config_in(tmp_path / out, seed=seed, trials=12, methods="sam,asam"))
    first, second, third = ([chosen(config)[:4] for config in train.calls[i : i + 12]] for i in (0, 12, 24))
    assert first == second
    assert first != third
    assert len(set(first)) == 12


def test_a_search_in_two_parts_makes_the_same_trials_as_one(train: FakeTrain, tmp_path: Path) -> None:
    sweep(config_in(tmp_path / "one", trials=14, pruner="median"))
    sweep(config_in(tmp_path / "two", trials=5, pruner="median"))
    sweep(config_in(tmp_path / "two", trials=14, pruner="median"))
    whole, parts = train.calls[:14], train.calls[14:]
    assert [chosen(config) for config in parts] == [chosen(config) for config in whole]
    assert train.stopped


def test_a_finished_search_trains_nothing(train: FakeTrain, tmp_path: Path) -> None:
    first = sweep(config_in(tmp_path))
    train.calls.clear()
    assert sweep(config_in(tmp_path)).rows == first.rows
    assert not train.calls


def test_several_seeds_are_trained_and_their_mean_counts(train: FakeTrain, tmp_path: Path) -> None:
    found = sweep(config_in(tmp_path, seeds=3, seed=7, trials=2))
    assert [config.seed for config in train.calls] == [7, 8, 9, 7, 8, 9]
    for number in range(2):
        heights = [height(config) for config in train.calls[3 * number : 3 * number + 3]]
        row = next(row for row in found.rows if row.number == number)
        assert row.accuracies == pytest.approx(heights, abs=1e-12)
        assert row.accuracy == pytest.approx(sum(heights) / 3, abs=1e-12)
        mean = sum(heights) / 3
        deviation = math.sqrt(sum((value - mean) ** 2 for value in heights) / 2)
        assert row.ci95 == pytest.approx(4.302652729911275 * deviation / math.sqrt(3), rel=1e-9)
    assert "--seed 10" in found.results["again"]


def test_a_trial_below_the_median_is_stopped_and_is_no_result(train: FakeTrain, tmp_path: Path) -> None:
    found = sweep(config_in(tmp_path, trials=20, pruner="median", sampler="random"))
    stopped = [row for row in found.rows if row.pruned]
    assert len(stopped) == len(train.stopped) > 0
    assert len(train.calls) == 20
    ended = finished(found.rows)
    assert found.rows == ended + stopped
    numbers = {number for number, config in enumerate(train.calls) if config in train.stopped}
    assert {row.number for row in stopped} == numbers
    # By the definition: the highest value so far is below the median of the others at the same epoch. Here the order
    # of trials is the same at all epochs, so each that was stopped is below the median of all that ended before it.
    for row in stopped:
        before = sorted(height(config) for config in train.calls[: row.number] if config not in train.stopped)
        final = height(train.calls[row.number])
        assert final < before[len(before) // 2]
        assert row.accuracies == []
        assert row.epoch < EPOCHS
        assert found.results["best"]["number"] != row.number


def test_hyperband_stops_trials_too(train: FakeTrain, tmp_path: Path) -> None:
    found = sweep(config_in(tmp_path, trials=25, pruner="hyperband", fixed={**FIXED, "epochs": 9}))
    assert 0 < sum(row.pruned for row in found.rows) == len(train.stopped) < 25


def test_what_another_call_left_stopped_in_the_folder_is_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, asked = FakeTrain(), []

    def train(config: TrainConfig, on_epoch: Callable[[dict[str, object]], object]) -> dict[str, object]:
        asked.append(config.fresh)
        if not config.fresh:
            return {"stopped": True, "history": [{"epoch": 1, "validation_accuracy": 0.99}]}
        return fake(config, on_epoch)

    monkeypatch.setattr("flatwise.lab.sweep.perform.train", train)
    found = sweep(config_in(tmp_path, trials=1))
    assert asked == [False, True]
    assert found.rows[0].accuracy == pytest.approx(height(fake.calls[0]))


def test_other_settings_in_one_study_are_refused_with_what_differs(train: FakeTrain, tmp_path: Path) -> None:
    sweep(config_in(tmp_path, trials=1))
    with pytest.raises(UserError, match=r"--epochs is 4 there, 5 here; --lr is 0.01:0.3:log there, 0.1 here") as raised:
        sweep(config_in(tmp_path, trials=2, lr="0.1", fixed={**FIXED, "epochs": 5}))
    assert "--study" in str(raised.value)
    assert states(tmp_path) == ["complete"]


def test_fresh_begins_again(train: FakeTrain, tmp_path: Path) -> None:
    sweep(config_in(tmp_path, trials=2))
    found = sweep(config_in(tmp_path, trials=1, fresh=True, lr="0.1"))
    assert [row.lr for row in found.rows] == [0.1]


def test_ctrl_c_leaves_a_study_that_goes_on_with_the_same_trial(train: FakeTrain, tmp_path: Path) -> None:
    def interrupt(config: TrainConfig, epoch: int) -> None:
        if len(train.calls) == 3 and epoch == 2:
            raise KeyboardInterrupt

    train.at_epoch = interrupt
    with pytest.raises(KeyboardInterrupt):
        sweep(config_in(tmp_path, trials=5))
    assert states(tmp_path) == ["complete", "complete", "fail", "waiting"]
    written = json.loads((tmp_path / "digits-mlp" / "results.json").read_text())
    assert len(written["trials"]) == 2

    train.at_epoch = lambda config, epoch: None
    found = sweep(config_in(tmp_path, trials=5))
    assert states(tmp_path) == ["complete", "complete", "fail", "complete", "complete", "complete"]
    # The same settings in the same folder: a training that keeps checkpoints goes on there.
    assert train.calls[3] == train.calls[2]
    assert len({config.out for config in train.calls}) == 5
    assert len(found.rows) == 5


def test_an_interrupted_search_tries_the_settings_of_one_that_was_not(train: FakeTrain, tmp_path: Path) -> None:
    sweep(config_in(tmp_path / "one", trials=13))
    whole = [chosen(config) for config in train.calls]
    train.calls.clear()

    def interrupt(config: TrainConfig, epoch: int) -> None:
        if len(train.calls) in (3, 12) and epoch == 2:
            raise KeyboardInterrupt

    train.at_epoch = interrupt
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sweep(config_in(tmp_path / "two", trials=13))
        train.calls.append(train.calls[-1])  # so that the count goes on
    sweep(config_in(tmp_path / "two", trials=13))
    assert list(dict.fromkeys(chosen(config) for config in train.calls)) == whole


def test_a_trial_whose_process_vanished_is_begun_again_three_times_at_most(train: FakeTrain, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def vanish(config: TrainConfig, epoch: int) -> None:
        raise Killed

    train.at_epoch = vanish
    with pytest.MonkeyPatch.context() as patch:
        # A process that is killed says nothing to the study.
        patch.setattr("flatwise.lab.sweep.search.Search.__exit__", lambda self, *reason: None)
        for _ in range(3):
            with pytest.raises(Killed):
                sweep(config_in(tmp_path, trials=2))
    assert states(tmp_path) == ["fail", "fail", "running"]
    train.at_epoch = lambda config, epoch: None
    sweep(config_in(tmp_path, trials=2))
    assert states(tmp_path) == ["fail", "fail", "fail", "complete", "complete"]
    assert train.calls[0] == train.calls[1] == train.calls[2] != train.calls[3]


def test_a_trial_that_cannot_be_trained_is_a_bad_one_and_the_search_goes_on(train: FakeTrain, tmp_path: Path) -> None:
    def diverge(config: TrainConfig, epoch: int) -> None:
        if len(train.calls) in (1, 3, 5, 6) and epoch == 2:
            raise TrainingError("the loss is nan in step 7")

    train.at_epoch = diverge
    found = sweep(config_in(tmp_path, trials=8))
    failed = [row for row in found.rows if row.failed is not None]
    assert sorted(row.number for row in failed) == [0, 2, 4, 5]
    assert all(row.pruned and row.failed == "the loss is nan in step 7" for row in failed)
    assert len(finished(found.rows)) == 4


def test_where_nothing_can_be_trained_the_search_ends_and_says_why(train: FakeTrain, tmp_path: Path) -> None:
    def diverge(config: TrainConfig, epoch: int) -> None:
        raise TrainingError("the loss is nan in step 1")

    train.at_epoch = diverge
    with pytest.raises(TrainingError, match="the first 3 trials failed; the last: the loss is nan in step 1"):
        sweep(config_in(tmp_path, trials=50))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CannotWriteError(Path("x"), OSError(28, "No space left on device")), CannotWriteError),
        (UserError("unknown data set"), UserError),
        (RuntimeError("out of\nmemory"), TrainingError),
    ],
)
def test_an_error_ends_the_search_and_its_trial_is_kept_for_later(
    train: FakeTrain, tmp_path: Path, error: Exception, kind: type[Exception]
) -> None:
    def fail(config: TrainConfig, epoch: int) -> None:
        raise error

    train.at_epoch = fail
    with pytest.raises(kind):
        sweep(config_in(tmp_path))
    assert states(tmp_path) == ["fail", "waiting"]


def test_half_a_line_at_the_end_of_the_journal_is_mended(train: FakeTrain, tmp_path: Path) -> None:
    sweep(config_in(tmp_path, trials=2))
    journal = tmp_path / "digits-mlp" / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker_id":"x')
    (tmp_path / "digits-mlp" / "study.journal.lock").touch()  # of a process that was killed while it wrote
    assert len(sweep(config_in(tmp_path, trials=3)).rows) == 3
    assert journal.read_bytes().startswith(whole)


def test_a_damaged_journal_is_one_clear_line(train: FakeTrain, tmp_path: Path) -> None:
    sweep(config_in(tmp_path, trials=1))
    journal = tmp_path / "digits-mlp" / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b"not JSON\n", *lines[2:]]))
    with pytest.raises(UserError, match="is damaged: --fresh begins again"):
        sweep(config_in(tmp_path, trials=2))


def test_a_second_process_in_the_folder_is_refused(train: FakeTrain, tmp_path: Path) -> None:
    seen: list[str] = []

    def second(config: TrainConfig, epoch: int) -> None:
        if not seen:
            with pytest.raises(UserError, match="another process") as raised:
                sweep(config_in(tmp_path))
            seen.append(str(raised.value))

    train.at_epoch = second
    sweep(config_in(tmp_path, trials=1))
    assert seen


def test_no_trial_is_begun_after_the_time(train: FakeTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("flatwise.lab.sweep.search.time.monotonic", lambda: now[0])

    def hurry(config: TrainConfig, epoch: int) -> None:
        now[0] += 10.0  # four epochs are forty seconds

    train.at_epoch = hurry
    found = sweep(config_in(tmp_path, trials=50, minutes=1.5))
    assert len(found.rows) == 3
    assert [row.seconds for row in found.rows] == [40.0] * 3


def test_a_length_in_steps_makes_epochs_that_the_settings_do_not_say(train: FakeTrain, tmp_path: Path) -> None:
    found = sweep(config_in(tmp_path, trials=2, seeds=2, fixed={**FIXED, "steps": 10}))
    # Epochs are numbered through the trial's trainings: none is reported twice.
    assert [row.epoch for row in found.rows] == [2 * EPOCHS] * 2


def test_the_caller_settings_of_optuna_are_left_as_they_were(train: FakeTrain, tmp_path: Path) -> None:
    before = optuna.logging.get_verbosity()
    sweep(config_in(tmp_path, trials=1))
    assert optuna.logging.get_verbosity() == before


def test_a_sweep_is_called_from_python_with_few_words(train: FakeTrain, tmp_path: Path) -> None:
    found = sweep(replace(SweepConfig(trials=1, fixed=FIXED), out=str(tmp_path)))
    assert found.folder == tmp_path / "digits-mlp"


def test_what_was_stopped_stands_last_whatever_its_accuracy() -> None:
    study = optuna.create_study(direction="maximize")
    facts = {"chosen": {"method": "sam", "rho": 0.1, "lr": 0.1, "weight_decay": 0.0}, "seconds": 1.0, "machine": "here"}
    for state, value in (
        (TrialState.PRUNED, 0.9),
        (TrialState.COMPLETE, 0.0),
        (TrialState.PRUNED, 0.4),
        (TrialState.COMPLETE, 0.7),
    ):
        study.add_trial(
            optuna.trial.create_trial(state=state, value=value, user_attrs={**facts, "accuracies": [value]})
        )
    assert [row.number for row in rows_of(study)] == [3, 1, 0, 2]
