"""A study that machines share: signs of life, trials of machines that died, and passwords that nobody sees."""

from __future__ import annotations

import datetime
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.lab.sweep_world import FakeTrain, config_in, height

from flatwise.errors import TrainingError, UserError
from flatwise.lab.sweep import sweep
from flatwise.lab.sweep.storage import GRACE, Heart, shared_storage, shown_url
from flatwise.lab.train import TrainConfig


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    fake = FakeTrain()
    monkeypatch.setattr("flatwise.lab.sweep.perform.train", fake)
    monkeypatch.setattr("flatwise.lab.sweep.run.draw", lambda rows, path, **words: None)
    return fake


def test_two_folders_share_a_study(train: FakeTrain, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    one = config_in(tmp_path / "one", trials=3, storage=url)
    sweep(one)
    found = sweep(replace(one, out=str(tmp_path / "two"), trials=7))
    assert len(train.calls) == 7
    assert [row.number for row in sorted(found.rows, key=lambda row: row.number)] == list(range(7))
    assert sorted(row.accuracy or 0 for row in found.rows) == pytest.approx(sorted(map(height, train.calls)))
    # Each trains in a folder of its own machine.
    assert {Path(config.out).parts[-4] for config in train.calls[:3]} == {"one"}
    assert {Path(config.out).parts[-4] for config in train.calls[3:]} == {"two"}
    with pytest.raises(UserError, match=r"in the database was made with other settings \(--lr"):
        sweep(replace(one, lr="0.1", trials=9))


class Killed(BaseException):
    pass


def die_in_third(train: FakeTrain) -> None:
    def vanish(config: TrainConfig, epoch: int) -> None:
        if len(train.calls) == 3:
            raise Killed

    train.at_epoch = vanish


def test_the_trial_of_a_machine_that_died_is_taken_over_when_it_is_silent_for_long(
    train: FakeTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "shared.db"
    config = config_in(tmp_path / "one", trials=5, storage=f"sqlite:///{database}")
    die_in_third(train)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("flatwise.lab.sweep.search.Search.__exit__", lambda self, *reason: None)
        sweep(config)
    train.at_epoch = lambda config, epoch: None

    # Another machine leaves it alone while its last sign of life is fresh: it counts as running.
    two = replace(config, out=str(tmp_path / "two"))
    assert len(sweep(two).rows) == 4
    assert len(train.calls) == 5
    silent = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=GRACE + 60)
    with sqlite3.connect(database) as connection:
        connection.execute("update trial_heartbeats set heartbeat = ?", (silent.strftime("%Y-%m-%d %H:%M:%S"),))
    connection.close()
    assert len(sweep(two).rows) == 5
    lost, again = train.calls[2], train.calls[5]
    assert replace(again, out=lost.out) == lost


def test_the_machine_itself_takes_its_trials_up_at_once(
    train: FakeTrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path / "one", trials=5, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    die_in_third(train)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("flatwise.lab.sweep.search.Search.__exit__", lambda self, *reason: None)
        sweep(config)
    train.at_epoch = lambda config, epoch: None
    assert len(sweep(config).rows) == 5
    assert train.calls[3] == train.calls[2]


def test_a_trial_that_another_machine_took_over_is_left_to_it(train: FakeTrain, tmp_path: Path) -> None:
    import optuna

    url = f"sqlite:///{tmp_path / 'shared.db'}"

    def taken(config: TrainConfig, epoch: int) -> None:
        if len(train.calls) == 2 and epoch == 2:
            study = optuna.load_study(study_name="digits-mlp", storage=url)
            study.tell(1, state=optuna.trial.TrialState.FAIL)

    train.at_epoch = taken
    found = sweep(config_in(tmp_path, trials=4, storage=url))
    assert sorted(row.number for row in found.rows) == [0, 2, 3, 4]
    assert train.stopped == [train.calls[1]]


def test_signs_of_life_are_given_while_a_trial_runs_and_no_longer() -> None:
    import threading

    class Database:
        def __init__(self) -> None:
            self.signs: list[int] = []
            self.second = threading.Event()

        def get_study_id_from_name(self, name: str) -> int:
            return {"mine": 7}[name]

        def get_trial_id_from_study_id_trial_number(self, study: int, number: int) -> int:
            return 100 * study + number

        def record_heartbeat(self, trial: int) -> None:
            self.signs.append(trial)
            if len(self.signs) == 2:
                raise ConnectionError  # away for a moment
            if len(self.signs) > 3:
                self.second.set()

    database = Database()
    with Heart(database, interval=0.01) as heart:  # type: ignore[arg-type]
        heart.add("mine", 3)
        assert database.second.wait(timeout=60)
        heart.remove(3)
        heart.add("mine", 4)
    assert set(database.signs) == {703, 704}
    assert database.signs[-1] == 704


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql+psycopg://me@host/db?password=secret", "postgresql+psycopg://me@host/db"),
        ("sqlite:///shared.db", "sqlite:///shared.db"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def nothing(*words: object) -> None:
    """What is done with a stale trial, where there is none."""


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [
        ("postgresql+psycopg2://me:secret@host/db", "psycopg2", "psycopg2-binary"),
        ("postgresql+psycopg://me:secret@host/db", "psycopg", "psycopg[binary]"),
        ("mysql+pymysql://me:secret@host/db", "pymysql", "pymysql"),
    ],
)
def test_a_missing_driver_is_named_as_pip_knows_it(
    url: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="needs a driver") as raised:
        shared_storage(url, nothing)
    assert f"pip install '{package}'" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("url", ["me:secret@host", "postgres!://me:secret@host/db", "secret", "nosuch://me:secret@h/d"])
def test_what_is_no_address_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UserError, match="--storage is no URL of a known database") as raised:
        shared_storage(url, nothing)
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__


def test_a_database_that_does_not_answer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not answer") as raised:
        shared_storage(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}", nothing)
    assert "\n" not in str(raised.value)
    assert "unable to open database file" in str(raised.value)


def test_a_database_that_fails_in_between_is_one_clear_line(train: FakeTrain, tmp_path: Path) -> None:
    database = tmp_path / "shared.db"

    def fail(config: TrainConfig, epoch: int) -> None:
        if len(train.calls) == 2:
            database.write_bytes(b"this is no database any more" * 1000)

    train.at_epoch = fail
    with pytest.raises(TrainingError, match=r"does not answer: .*; the same command continues") as raised:
        sweep(config_in(tmp_path / "runs", trials=4, storage=f"sqlite:///{database}"))
    assert "\n" not in str(raised.value)


def test_no_file_holds_the_address_of_the_database(train: FakeTrain, tmp_path: Path) -> None:
    secret = tmp_path / "secret.db"
    found = sweep(config_in(tmp_path / "runs", trials=2, storage=f"sqlite:///{secret}"))
    files = [path for path in found.folder.rglob("*") if path.is_file()]
    assert files
    assert not any(b"secret" in path.read_bytes() for path in files)
