"""The images: what is loaded, from where, and what is said where nothing is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from tests.lab import data_files as files

from flatwise.errors import UserError
from flatwise.lab.data import ImageData, load_data
from flatwise.lab.idx import read_idx
from flatwise.lab.sets.small import DIGITS_TEST_SHARE, stratified_indices


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Only what a test writes is there: no system folder, no cache, no network."""
    files.nothing_installed(monkeypatch, tmp_path)
    yield
    files.forget()


def test_digits_are_all_there_once() -> None:
    data = load_data("digits")
    inputs = torch.cat([data.train_inputs, data.test_inputs])
    assert inputs.shape == (1797, 1, 8, 8)
    whole = load_digits().images.reshape(1797, -1)
    restored = torch.from_numpy(whole).float() / 16
    counted = restored.sum(1).sort().values
    mean, deviation = _raw_statistics(data)
    torch.testing.assert_close((inputs.flatten(1) * deviation + mean).sum(1).sort().values, counted)


def test_the_bytes_give_back_the_files_values_bit_for_bit(tmp_path: Path, write_idx) -> None:
    bunch = load_digits()
    held = torch.zeros(1797, dtype=torch.bool)
    held[stratified_indices(torch.from_numpy(bunch.target), DIGITS_TEST_SHARE)] = True
    digits = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 16
    write_idx(tmp_path, packed=False)
    fashion = [
        read_idx(tmp_path / f"{part}-images-idx3-ubyte").unsqueeze(1).float() / 255 for part in ("train", "t10k")
    ]
    for data, (train, test) in (
        (load_data("digits"), (digits[~held], digits[held])),
        (load_data("fashion-mnist", str(tmp_path)), fashion),
    ):
        mean, deviation = train.mean(), train.std()
        assert torch.equal(data.train_inputs, (train - mean) / deviation)
        assert torch.equal(data.test_inputs, (test - mean) / deviation)


def _raw_statistics(data: ImageData) -> tuple[float, float]:
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target)
    held = torch.zeros(1797, dtype=torch.bool)
    held[stratified_indices(labels, DIGITS_TEST_SHARE)] = True
    raw = torch.from_numpy(bunch.images).float()[~held] / 16
    return float(raw.mean()), float(raw.std())


def test_digits_test_set_holds_a_fifth_of_every_class_and_never_changes() -> None:
    labels = torch.from_numpy(load_digits().target)
    chosen = stratified_indices(labels, 0.2)
    for value in range(10):
        assert int((labels[chosen] == value).sum()) == round(0.2 * int((labels == value).sum()))
    torch.manual_seed(99)
    assert torch.equal(chosen, stratified_indices(labels, 0.2))


def test_inputs_are_standardised_by_the_training_part() -> None:
    data = load_data("digits")
    assert float(data.train_inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train_inputs.std()) == pytest.approx(1, abs=1e-5)
    assert abs(float(data.test_inputs.mean())) > 1e-6


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["FashionMNIST/raw", "."])
def test_fashion_mnist_under_the_root(tmp_path: Path, write_idx, packed: bool, below: str) -> None:
    write_idx(tmp_path / below, packed=packed)
    data = load_data("fashion-mnist", str(tmp_path))
    assert data.train_inputs.shape == (60, 1, 28, 28)
    assert data.test_labels.tolist() == [count % 10 for count in range(20)]
    assert data.flips


def test_fashion_mnist_in_the_system_folder(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path / "system" / "fashion-mnist", packed=True)
    assert len(load_data("fashion-mnist").train_labels) == 60


def test_fashion_mnist_downloaded(tmp_path: Path, write_idx, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: str, download: bool) -> None:
        write_idx(Path(root) / "FashionMNIST" / "raw", packed=False)

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    assert len(load_data("fashion-mnist", str(tmp_path / "new")).test_labels) == 20


def test_the_error_lists_the_three_ways(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_data("fashion-mnist", str(tmp_path / "empty"))
    text = str(caught.value)
    for part in (
        str(tmp_path / "system"),
        "--data-root",
        "FashionMNIST/raw",
        "download",
        str(tmp_path / "empty"),
    ):
        assert part in text
    assert "\n" not in text


def test_three_files_of_four_are_not_enough(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, packed=False)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="not found"):
        load_data("fashion-mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file of unsigned bytes"),
        (b"\0\0\x08\x03\0\0", "cut off inside its header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "holds 3 values where its header states 5"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_idx(path)


def test_a_cut_off_packed_file_is_named(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read .*train-images"):
        read_idx(path)


def test_images_and_labels_must_belong_together(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, packed=False)
    write_idx(tmp_path / "other", packed=False, train=50)
    (tmp_path / "other" / "train-labels-idx1-ubyte").replace(tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(UserError, match="60 and 50 entries"):
        load_data("fashion-mnist", str(tmp_path))
