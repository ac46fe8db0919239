"""The run folder: one name for one set of settings, one writer at a time, whole files only."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest

from flatwise.errors import UserError
from flatwise.files import read_json, write_atomically, write_json
from flatwise.lab import lock
from flatwise.lab.config import NOT_PART_OF_THE_RESULT, CompareConfig
from flatwise.lab.folder import RunFolder, file_name

OTHER = {
    "methods": "sgd,sam", "rho": 0.1, "optimizer": "adamw", "dataset": "fashion-mnist", "model": "mlp",
    "epochs": 3, "seeds": 2, "batch_size": 8, "lr": 0.3, "weight_decay": 0.1, "momentum": 0.5,
    "label_noise": 0.2, "train_size": 50, "val_fraction": 0.2, "augment": "basic", "equal_compute": True,
    "workers": 3, "out": "x", "data_root": "y", "fresh": True, "quiet": True,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(CompareConfig)])
def test_each_setting_that_changes_a_number_changes_the_folder(name: str) -> None:
    default = CompareConfig()
    changed = replace(default, **{name: OTHER[name]})
    assert (changed.folder_name() == default.folder_name()) == (name in NOT_PART_OF_THE_RESULT)


def test_two_ways_to_say_the_same_share_a_folder() -> None:
    assert CompareConfig(methods="base,sam", lr=0.05).folder_name() == CompareConfig(methods="sgd,sam").folder_name()


def test_file_names_of_different_methods_differ() -> None:
    assert file_name("sam:rho=0.5") == "sam_rho=0.5"
    assert "/" not in file_name("sam:a=b/c")
    assert len({file_name(name) for name in ("sam:rho=0.5", "sam%rho=0.5", "sam/rho=0.5", "sam rho=0.5")}) == 4


def holding(folder: Path) -> subprocess.Popen[str]:
    """Start a process that is in the folder, and stays."""
    code = (
        "import sys; from pathlib import Path; from flatwise.lab.folder import RunFolder\n"
        f"with RunFolder(Path({str(folder)!r})).locked():\n    print('in', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "in\n"
    return holder


def test_a_second_process_is_refused_and_told_who(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        with pytest.raises(UserError, match=f"pid {holder.pid}"), RunFolder(tmp_path).locked():
            pass
        holder.kill()
        holder.wait()
        assert holder.stdin is not None
        # The lock file of the killed process is still there, and locks nobody out.
        assert (tmp_path / ".lock").read_text() == str(holder.pid)
        with RunFolder(tmp_path).locked():
            pass


def test_a_process_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        ending = threading.Timer(0.3, holder.kill)
        ending.start()
        with RunFolder(tmp_path).locked():
            pass
        ending.join()


def test_what_a_killed_process_had_half_written_goes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    (tmp_path / "jobs" / ".sam-seed0.json.4711.part").write_text("half")
    with folder.locked():
        assert list((tmp_path / "jobs").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_that_outlives_the_block_holds_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that reads images, whose parent was killed."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    reading, writing = os.pipe()
    begun, there = os.pipe()
    with RunFolder(tmp_path).locked(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.write(there, b".")
            os.read(reading, 1)  # until the parent has closed its end
            os._exit(0)
        os.read(begun, 1)  # the child runs
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), RunFolder(tmp_path).locked():
            pass  # it is the parent's still
    with RunFolder(tmp_path).locked():
        pass
    os.close(writing)
    os.waitpid(child, 0)
    for end in (reading, begun, there):
        os.close(end)


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"), RunFolder(tmp_path).locked():
        raise RuntimeError("inside")
    with RunFolder(tmp_path).locked():
        pass


def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"value": 1})

    def disk_full(file: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*results.json: No space left on device") as caught:
        write_atomically(path, disk_full)
    assert caught.value.exit_code == 1
    assert read_json(path) == {"value": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_json_holds_no_nan_and_damage_reads_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "d": (1, 2)})
    assert read_json(path) == {"a": [None, 1.5], "b": {"c": None}, "d": [1, 2]}
    path.write_text(path.read_text()[:-5])
    assert read_json(path) is None
    assert read_json(tmp_path / "missing.json") is None


def test_clearing_leaves_what_others_wrote(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    folder.results.write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    folder.clear()
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
