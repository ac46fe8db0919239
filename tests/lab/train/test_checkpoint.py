"""Files that are cut off, changed, foreign or cannot be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.train.test_resume import Stop, assert_alike, folder_of, stopping_at

from flatwise.errors import CannotWriteError, TrainingError, UserError
from flatwise.lab.train import TrainConfig, course, train
from flatwise.lab.train import checkpoint as checkpoints
from flatwise.lab.train.checkpoint import HEAD, Checkpoints
from flatwise.lab.train.room import SPARE, check_room

Tiny = Callable[..., TrainConfig]


def pair(folder: Path, settings: str = "these") -> Checkpoints:
    return Checkpoints((folder / "a", folder / "b"), settings)


def content(step: int) -> dict[str, Any]:
    return {"step": step, "state": {"weight": torch.full((50,), float(step))}}


def test_the_files_take_turns_and_the_newest_is_read(tmp_path: Path) -> None:
    files = pair(tmp_path)
    assert files.load() == (None, [])
    for step in (1, 2, 3):
        files.save(content(step))
        found, notices = pair(tmp_path).load()
        assert found is not None
        assert (found["step"], notices) == (step, [])
        assert torch.equal(found["state"]["weight"], torch.full((50,), float(step)))
    again = pair(tmp_path)
    again.load()
    again.save(content(4))  # over the older one
    assert sorted(int(torch_step(tmp_path / name)) for name in "ab") == [3, 4]


def torch_step(path: Path) -> int:
    import io

    step: int = torch.load(io.BytesIO(path.read_bytes()[len(HEAD) + 65 :]), weights_only=True)["step"]
    return step


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def one_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def longer(data: bytes) -> bytes:
    return data + b"0"


def empty(data: bytes) -> bytes:
    return b""


def foreign(data: bytes) -> bytes:
    return b"PK\x03\x04" + data


def malicious(data: bytes) -> bytes:
    """Of the right form and digest, but a pickle that would run code."""
    import hashlib
    import io

    body = io.BytesIO()
    torch.save({"step": 9, "code": os.system}, body)
    return HEAD + hashlib.sha256(body.getvalue()).hexdigest().encode() + b"\n" + body.getvalue()


DAMAGES = {
    cut: "damaged", one_bit: "damaged", longer: "damaged", empty: "is no checkpoint", foreign: "is no checkpoint",
    malicious: "cannot be read",
}  # fmt: skip


@pytest.mark.parametrize(("damage", "word"), DAMAGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_file_leaves_the_one_before(tmp_path: Path, damage: Callable[[bytes], bytes], word: str) -> None:
    files = pair(tmp_path)
    files.save(content(1))
    files.save(content(2))
    newest = tmp_path / "b"
    newest.write_bytes(damage(newest.read_bytes()))
    after = pair(tmp_path)
    found, notices = after.load()
    assert found is not None
    assert found["step"] == 1
    assert len(notices) == 1
    assert word in notices[0]
    assert "goes on from a, which is whole (step 1)" in notices[0]
    after.save(content(5))
    assert torch_step(newest) == 5  # the damaged one is what is written over
    (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes()))
    newest.write_bytes(damage(newest.read_bytes()))
    found, notices = pair(tmp_path).load()
    assert found is None
    assert len(notices) == 2
    assert all("starts again from its beginning" in notice for notice in notices)


def test_each_byte_matters(tmp_path: Path) -> None:
    files = pair(tmp_path)
    files.save(content(1))
    data = (tmp_path / "a").read_bytes()
    for place in range(0, len(data), 37):
        (tmp_path / "a").write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        assert pair(tmp_path).load()[0] is None, place


def test_a_file_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    pair(tmp_path).save(content(1))
    found, notices = pair(tmp_path, "others").load()
    assert found is None
    assert "other settings, labels or number of processes" in notices[0]


@pytest.mark.usefixtures("with_dropout")
@pytest.mark.parametrize("damage", [cut, one_bit, empty])
def test_a_training_goes_on_from_the_older_one(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    whole, config = tiny("whole", ema=0.8), tiny("broken", ema=0.8, checkpoint_minutes=0.0)
    train(whole)
    with monkeypatch.context() as patched:
        stopping_at(patched, 6, before=True)
        with pytest.raises(Stop):
            train(config)
    newest = max(folder_of(config).checkpoints, key=torch_step)
    newest.write_bytes(damage(newest.read_bytes()))
    notices: list[str] = []
    begun: list[int] = []
    train(config, on_step=lambda done, total: begun.append(done), on_notice=notices.append)
    assert begun[0] == 5
    assert newest.name in notices[0]
    assert_alike(whole, config)


def test_other_labels_are_other_settings(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher was trained again, with other weights, while the student was interrupted."""
    teacher = tiny("teacher", seed=1)
    train(teacher)
    config = tiny("student", labels_from=str(folder_of(teacher).path), checkpoint_minutes=0.0)
    with monkeypatch.context() as patched:
        stopping_at(patched, 6, before=True)
        with pytest.raises(Stop):
            train(config)
    weights = folder_of(teacher).weights
    state = torch.load(weights, weights_only=True)
    torch.save({name: value.flip(0) for name, value in state.items()}, weights)
    notices: list[str] = []
    train(config, on_notice=notices.append)
    assert len(notices) == 2
    assert "labels" in notices[0]


@pytest.mark.usefixtures("with_dropout")
def test_a_checkpoint_that_cannot_be_written_stops_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, config = tiny("whole"), tiny("full", checkpoint_minutes=0.0)
    train(whole)
    write, full = checkpoints.write_atomically, True

    def on_full_disk(path: Path, content: Any, **options: Any) -> None:
        if full:
            raise CannotWriteError(path, OSError(errno.ENOSPC, "No space left on device"))
        write(path, content, **options)

    notices: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write_atomically", on_full_disk)
        train(config, on_notice=notices.append)
    assert len(notices) == 1  # once, not at each of them
    assert "No space left on device; the training goes on, and the checkpoint before this one stays" in notices[0]
    assert_alike(whole, config)


def test_room_is_asked_for_before_the_first_step(tmp_path: Path) -> None:
    check_room(tmp_path, [10_000, 20_000])
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrainingError, match=r"cannot take the 1\.0 MB that this training writes there"):
        check_room(tmp_path / "missing", [1_000_000])


def test_what_is_there_already_needs_no_room_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(course, "check_room", lambda folder, sizes: asked.append(len(sizes)))
    config = tiny(keep_epochs="0,1,2")
    with monkeypatch.context() as patched:
        stopping_at(patched, 5, before=True)
        with pytest.raises(Stop):
            train(config)
    train(config)
    # A new checkpoint beside two, the weights, and those kept; then one checkpoint is there, and those of 0 and 1.
    assert asked == [3 + 1 + 3, 2 + 1 + 1]


@pytest.mark.parametrize(
    "settings", [{"method": "fsam", "optimizer": "adamw", "ema": 0.8}, {"method": "gsam:alpha=0.4"}, {"method": "base"}]
)
def test_the_room_that_is_asked_for_is_enough(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    asked: list[int] = []
    monkeypatch.setattr(course, "check_room", lambda folder, sizes: asked.extend(sizes))
    saved: list[int] = []
    save = Checkpoints.save

    def measured(files: Checkpoints, content: dict[str, Any]) -> None:
        saved.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(content["state"])))
        save(files, content)

    monkeypatch.setattr(Checkpoints, "save", measured)
    config = tiny(**settings)
    train(config)
    assert max(saved) <= asked[0] - SPARE + 1000  # the counts of steps, which AdamW has as tensors


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for entry in inside for tensor in tensors_in(entry)]


def test_what_is_written_survives_a_loss_of_power(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is on the disk before it takes the place of another."""
    import flatwise.files as files

    flushed: set[int] = set()
    replaced: dict[str, bool] = {}
    flush, replace = os.fsync, os.replace

    def flushing(number: int) -> None:
        flush(number)
        flushed.add(os.fstat(number).st_ino)

    def replacing(source: Path, target: Path) -> None:
        replaced[Path(target).name] = os.stat(source).st_ino in flushed
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", flushing)
    monkeypatch.setattr(files.os, "replace", replacing)
    train(tiny())
    for name in ("checkpoint-0", "checkpoint-1", "weights.pt", "result.json"):
        assert replaced[name], name


LIMITED = """
import resource, signal, sys
import torch
torch.set_num_threads(1)
from flatwise.lab.train import TrainConfig, train
from tests.lab.train.conftest import TINY
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    train(TrainConfig(**{**TINY, "out": sys.argv[1]}), on_step=lambda done, total: print("step", done))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_disk_that_is_too_small_is_found_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), "."]))}
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert out.startswith("TrainingError"), out
    assert "make room, or choose another place with --out" in out
    assert "step" not in out


def test_a_place_that_cannot_be_written(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError, match="cannot write"):
        train(tiny("file"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_a_full_tmpfs(tiny: Tiny, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        with pytest.raises(UserError, match="No space left on device"):
            train(tiny("small"))
    finally:
        subprocess.run(["umount", str(place)], check=True)
