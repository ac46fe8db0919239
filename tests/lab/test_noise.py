"""Wrong labels: exact in number, of the stated kind, recorded, and only where they are asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.noise import make_noisy, read_noise_file, with_pair_flips
from flatwise.lab.split import with_noise
from flatwise.seeds import stream

# Classes of different sizes, so that rounding each class on its own would miss the whole.
LABELS = torch.arange(10).repeat_interleave(torch.tensor([7, 13, 21, 3, 40, 40, 1, 55, 60, 17]))
LABELS = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))]
TRAINING = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(1))[:200]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.333, 0.8, 0.999])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_the_share_is_exact_and_recorded(kind: str, share: float) -> None:
    noisy, report = make_noisy(LABELS, TRAINING, 10, kind=kind, share=share, seed=3)
    right = LABELS[TRAINING]
    wrong = int((noisy != right).sum())
    assert wrong == round(share * 200)
    assert report.as_dict() == {
        "kind": kind if share else "none",
        "asked": share,
        "share": wrong / 200,
        "wrong": wrong,
        "labels": 200,
        "file": None,
        "digest": hashlib.sha256(np.array(noisy.tolist(), dtype="<i8").tobytes()).hexdigest(),
    }
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


def test_symmetric_noise_is_that_of_compare() -> None:
    noisy, _ = make_noisy(LABELS, TRAINING, 10, share=0.4, seed=5)
    assert torch.equal(noisy, with_noise(LABELS[TRAINING], 0.4, 10, stream(5, "noise")))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.45, 0.777])
def test_pair_flips_take_the_next_class_and_the_same_share_of_each(share: float) -> None:
    noisy = with_pair_flips(LABELS, share, 10, stream(0, "noise"))
    wrong = noisy != LABELS
    assert torch.equal(noisy[wrong], (LABELS[wrong] + 1) % 10)
    assert int(wrong.sum()) == round(share * len(LABELS))
    for value in range(10):
        members = value == LABELS
        assert abs(int(wrong[members].sum()) - share * int(members.sum())) < 1


def test_which_labels_flip_is_drawn_evenly() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    counts = sum((with_pair_flips(labels, 0.3, 2, stream(seed, "noise")) != 0).long() for seed in range(1000))
    # binomial, mean 300, deviation 14.5
    assert float((counts - 300).abs().max()) < 65


def test_the_seed_alone_decides() -> None:
    for kind in ("symmetric", "asymmetric"):
        first, report = make_noisy(LABELS, TRAINING, 10, kind=kind, share=0.3, seed=1)
        before = torch.get_rng_state()
        again, same = make_noisy(LABELS, TRAINING, 10, kind=kind, share=0.3, seed=1)
        assert torch.equal(before, torch.get_rng_state())
        other, different = make_noisy(LABELS, TRAINING, 10, kind=kind, share=0.3, seed=2)
        assert torch.equal(first, again)
        assert same == report
        assert not torch.equal(first, other)
        assert different.digest != report.digest


def test_the_labels_that_are_given_stay_right() -> None:
    before = LABELS.clone()
    for kind in ("symmetric", "asymmetric"):
        make_noisy(LABELS, TRAINING, 10, kind=kind, share=0.5)
    # the validation part is read from these, and so is always right
    assert torch.equal(before, LABELS)


@pytest.fixture
def worse() -> torch.Tensor:
    return torch.where(torch.arange(len(LABELS)) % 3 == 0, (LABELS + 4) % 10, LABELS)


@pytest.fixture
def human(tmp_path: Path, worse: torch.Tensor) -> Path:
    """A file as CIFAR-N publishes it: a dictionary of NumPy arrays, written by torch.save."""
    path = tmp_path / "CIFAR-10_human.pt"
    torch.save({"clean_label": LABELS.numpy(), "worse_label": worse.numpy(), "aggre_label": LABELS.numpy()}, path)
    return path


def test_a_file_in_the_format_of_cifar_n(human: Path, worse: torch.Tensor) -> None:
    noisy, report = make_noisy(LABELS, TRAINING, 10, file=f"{human}:worse_label")
    assert torch.equal(noisy, worse[TRAINING])
    wrong = int((TRAINING % 3 == 0).sum())
    assert (report.kind, report.asked, report.wrong, report.share) == ("file", None, wrong, wrong / 200)
    assert report.file == f"{human}:worse_label"
    assert make_noisy(LABELS, TRAINING, 10, file=f"{human}:clean_label")[1].wrong == 0


def test_files_written_with_numpy_1_and_old_torch(tmp_path: Path, worse: torch.Tensor) -> None:
    path = tmp_path / "old.pt"
    torch.save({"noisy_label": worse.numpy()}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in raw
    for core in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        path.write_bytes(raw.replace(b"numpy.core.multiarray", core))
        assert torch.equal(read_noise_file(str(path), LABELS, 10), worse)


@pytest.mark.parametrize("kind", ["int8", "int32", "int64", "uint8"])
def test_arrays_alone(tmp_path: Path, worse: torch.Tensor, kind: str) -> None:
    np.save(tmp_path / "labels.npy", worse.numpy().astype(kind))
    torch.save(worse.numpy().astype(kind), tmp_path / "array.pt")
    torch.save({"noisy": worse}, tmp_path / "one.pt")
    for name in ("labels.npy", "array.pt", "one.pt", "one.pt:noisy"):
        assert torch.equal(read_noise_file(str(tmp_path / name), LABELS, 10), worse)


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("harm",))


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        ({"a": LABELS, "b": LABELS}, "", "has several labels: name one of them, .*:a or :b"),
        ({"aggre_label": LABELS, "worse_label": LABELS}, ":worse", "unknown key .*did you mean 'worse_label'"),
        ({"a": LABELS[:-1]}, "", r"labels of shape \(256,\), and the data set 257 training images"),
        ({"a": LABELS.flip(0), "clean_label": LABELS.flip(0)}, ":a", "another data set or another order"),
        ({"a": LABELS + 1}, "", "labels from 1 to 10, and the 10 classes run from 0 to 9"),
        ({"a": LABELS.double()}, "", "type torch.float64; they must be whole numbers"),
        ({"a": "text"}, "", "has no labels"),
        ({"a": Harm()}, "", "something else than arrays"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, content: object, key: str, said: str, capsys) -> None:
    torch.save(content, tmp_path / "labels.pt")
    with pytest.raises(UserError, match=said) as caught:
        make_noisy(LABELS, TRAINING, 10, file=f"{tmp_path / 'labels.pt'}{key}")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["labels.pt", "labels.npy"])
@pytest.mark.parametrize("content", [b"", b"no labels at all", b"PK\x03\x04cut off"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path / name)) as caught:
        make_noisy(LABELS, TRAINING, 10, file=str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no noise file"):
        make_noisy(LABELS, TRAINING, 10, file=str(tmp_path / "nothing.pt:key"))
    with pytest.raises(UserError, match="leave out the share"):
        make_noisy(LABELS, TRAINING, 10, file="x.npy", share=0.2)
    with pytest.raises(UserError, match="not 1"):
        make_noisy(LABELS, TRAINING, 10, share=1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'symmetric'"):
        make_noisy(LABELS, TRAINING, 10, kind="symetric", share=0.2)
