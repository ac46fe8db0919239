"""Batches from disk: the key and the index decide each image, whatever the number of processes; errors stay errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.lab import data_files as files

from flatwise.errors import TrainingError, UserError
from flatwise.lab.images import load_images
from flatwise.lab.sets import disk
from flatwise.lab.sets.disk import OnDisk


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    files.forget()
    assert multiprocessing.active_children() == []


@pytest.fixture
def part(tmp_path: Path) -> OnDisk:
    """Twelve images of noise of several sizes."""
    for number in range(12):
        path = tmp_path / "train" / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(files.random_bytes(20 + number, 40 - number, 3, seed=number)).save(path)
    files.write_tree(tmp_path, {"test": {"a": 1}})
    train = load_images(str(tmp_path), resolution=16).train
    assert isinstance(train, OnDisk)
    return train


KEYS = torch.arange(12) * 2654435761 - 2**62
PLAN = [(torch.tensor([3, 0, 7, 7]), KEYS[:4]), (torch.tensor([11]), KEYS[4:5]), (torch.tensor([5, 2]), None)]


def test_an_image_depends_on_its_index_and_its_key_alone(part: OnDisk) -> None:
    whole = part.batch(torch.arange(12), KEYS)
    order = torch.tensor([5, 11, 0, 3])
    assert torch.equal(part.batch(order, KEYS[order]), whole[order])
    for index in range(12):
        assert torch.equal(part.batch(torch.tensor([index]), KEYS[index : index + 1])[0], whole[index])
    assert not torch.equal(part.batch(torch.tensor([3]), KEYS[:1])[0], whole[3])
    assert whole.dtype == torch.uint8
    assert whole.shape == (12, *part.shape)


def test_without_keys_the_same_centre_every_time(part: OnDisk) -> None:
    assert torch.equal(part.batch(torch.tensor([4, 1])), part.batch(torch.tensor([1, 4]), None).flip(0))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_processes_changes_nothing(part: OnDisk, workers: int) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = list(part.batches(PLAN, workers))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    assert len(found) == len(PLAN)
    for batch, (indices, keys) in zip(found, PLAN, strict=True):
        assert torch.equal(batch, part.batch(indices, keys))


def test_another_decoding_later_gives_the_same(part: OnDisk) -> None:
    first = list(part.batches(iter(PLAN), 2))
    torch.rand(3)
    assert all(torch.equal(one, two) for one, two in zip(first, part.batches(PLAN, 1), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_image_is_one_line_not_a_traceback(part: OnDisk, workers: int, content: bytes) -> None:
    part.path(11).write_bytes(content)
    found = part.batches(PLAN, workers)
    assert torch.equal(next(found), part.batch(*PLAN[0]))
    with pytest.raises(UserError) as caught:
        next(found)
    assert str(caught.value).startswith(f"broken image {part.path(11)}: ")
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_next_batches_are_decoded_while_the_first_is_used(
    part: OnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, decode = tmp_path / "log", disk.decode

    def logged(path: Path, resolution: int, key: int | None) -> torch.Tensor:
        with log.open("a") as file:
            file.write(f"{path.name} {os.getpid()}\n")
        return decode(path, resolution, key)

    monkeypatch.setattr(disk, "decode", logged)
    found = part.batches([(torch.tensor([index]), None) for index in range(8)], 1)
    next(found)
    # two batches are kept ready beside the one that is out; nothing more is asked for here
    for _ in range(1000):
        lines = log.read_text().splitlines()
        if len(lines) >= 3:
            break
        time.sleep(0.01)
    assert len(lines) == 3
    assert all(line.split()[1] != str(os.getpid()) for line in lines)
    found.close()


def test_a_process_that_ends_on_its_own_is_said_to_have_ended(part: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, resolution: int, key: int | None) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(disk, "decode", killed)
    with pytest.raises(TrainingError, match=r"a process that reads images ended: .*fewer --loader-workers") as caught:
        list(part.batches(PLAN, 1))
    assert "\n" not in str(caught.value)


def test_paths_keep_every_letter(tmp_path: Path) -> None:
    files.write_tree(tmp_path, {"train": {"zebra crossing": 1, "Ægithalos": 1}, "test": {"Ægithalos": 1}})
    images = load_images(str(tmp_path), resolution=8)
    assert images.class_names == ("zebra crossing", "Ægithalos")
    assert images.train.batch(torch.arange(2)).shape == (2, 3, 8, 8)
