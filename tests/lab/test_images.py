"""Every named data set, from files in its published format; and what is said where there are none, or wrong ones."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tests.lab import data_files as files

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.images import DATA_SETS, IMAGENET_MEAN, Images, load_images
from flatwise.lab.sets.memory import InMemory, checked, mean_and_deviation
from flatwise.lab.sets.sources import SOURCES


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    files.nothing_installed(monkeypatch, tmp_path)
    yield
    files.forget()


def everything(part: InMemory) -> torch.Tensor:
    return part.batch(torch.arange(len(part)))


def names_of(images: Images) -> list[str]:
    return [str(images.train.path(index).relative_to(images.train.folder)) for index in range(len(images.train))]


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, classes: int) -> None:
    pixels, labels = files.write_cifar(tmp_path, classes)
    images = load_images(f"cifar{classes}", tmp_path)
    assert np.array_equal(everything(images.train).numpy(), pixels)
    assert images.train_labels.tolist() == labels
    assert images.train_labels.dtype == torch.int64
    assert images.class_names[3] == "class 3"
    assert (images.classes, images.shape, len(images.test)) == (classes, (3, 32, 32), 8)
    assert (images.flips, images.padding, images.policy, images.on_disk) == (True, 4, "cifar", False)


def test_svhn_is_train_and_extra_and_its_tens_are_zeros(tmp_path: Path) -> None:
    written = files.write_svhn(tmp_path, "train", "extra", "test")
    whole, core = load_images("svhn", tmp_path), load_images("svhn-core", tmp_path)
    pixels = np.concatenate([written["train"], written["extra"]], axis=3).transpose(3, 2, 0, 1)
    assert np.array_equal(everything(whole.train).numpy(), pixels)
    assert whole.train_labels.tolist() == [*range(10), *range(10), 0]
    assert np.array_equal(everything(core.train).numpy(), written["train"].transpose(3, 2, 0, 1))
    assert np.array_equal(everything(core.test).numpy(), written["test"].transpose(3, 2, 0, 1))
    assert (whole.flips, whole.policy, whole.classes) == (False, "svhn", 10)


@pytest.mark.parametrize(("name", "below"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")])
def test_the_mnist_family(tmp_path: Path, write_idx, name: str, below: str) -> None:
    write_idx(tmp_path / below, packed=True)
    images = load_images(name, tmp_path)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(everything(images.train)[:, 0].long(), torch.randint(0, 256, (60, 28, 28), generator=generator))
    assert images.shape == (1, 28, 28)
    assert images.flips == (name == "fashion-mnist")
    assert images.class_names[0] == {"mnist": "0 - zero", "fashion-mnist": "T-shirt/top"}[name]


def test_mnist_is_never_taken_from_loose_files_that_may_be_fashion_mnist(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, packed=False)
    assert len(load_images("fashion-mnist", tmp_path).train) == 60
    with pytest.raises(UserError, match="MNIST not found"):
        load_images("mnist", tmp_path)


def test_digits_keep_their_levels() -> None:
    images = load_images("digits")
    both = torch.cat([everything(images.train), everything(images.test)]).flatten(1)
    levels = (both.double() * 16 / 255).round()
    bunch = torch.from_numpy(load_digits().images).flatten(1)
    assert torch.equal(levels.sort(0).values, bunch.sort(0).values)
    assert int(both.max()) == 255
    assert (images.flips, images.padding) == (False, 1)


def test_aircraft(tmp_path: Path) -> None:
    files.write_aircraft(tmp_path)
    images = load_images("aircraft", tmp_path)
    assert images.class_names == ("707-320", "A340-300", "DC 10")
    assert (images.train_labels.tolist(), images.test_labels.tolist()) == ([1, 2, 0], [2])
    assert names_of(images)[0] == "fgvc-aircraft-2013b/data/images/0000001.jpg"


def test_flowers_train_on_both_labelled_splits(tmp_path: Path) -> None:
    files.write_flowers(tmp_path)
    images = load_images("flowers", tmp_path)
    assert names_of(images) == [f"flowers-102/jpg/image_0000{number}.jpg" for number in (2, 1, 4, 5)]
    assert (images.train_labels.tolist(), images.test_labels.tolist()) == ([101, 0, 3, 4], [2, 5])
    assert images.classes == 102


def test_pets(tmp_path: Path) -> None:
    files.write_pets(tmp_path)
    images = load_images("pets", tmp_path)
    assert images.class_names == ("Abyssinian", "American Bulldog")
    assert (images.train_labels.tolist(), images.test_labels.tolist()) == ([0, 1], [1, 0])


def test_cars(tmp_path: Path) -> None:
    files.write_cars(tmp_path)
    images = load_images("cars", tmp_path)
    assert images.class_names == ("AM General Hummer", "Acura RL", "Acura TL")
    assert images.train_labels.tolist() == [1, 0, 2]
    assert names_of(images)[2] == "stanford_cars/cars_train/00003.jpg"
    assert images.test.path(0) == tmp_path / "stanford_cars" / "cars_test" / "00001.jpg"


def test_food(tmp_path: Path) -> None:
    files.write_food(tmp_path)
    images = load_images("food101", tmp_path)
    assert images.class_names == ("apple_pie", "waffles")
    assert images.train_labels.tolist() == [1, 1, 0, 0]
    assert images.test_labels.tolist() == [1, 0]


@pytest.mark.parametrize("below", ["imagenet", "ILSVRC2012", "."])
def test_imagenet_is_two_folders_of_classes(tmp_path: Path, below: str) -> None:
    files.write_tree(tmp_path / below, {"train": {"n01": 2, "n02": 1}, "val": {"n01": 1, "n02": 1}})
    images = load_images("imagenet", tmp_path, resolution=32)
    assert images.class_names == ("n01", "n02")
    assert images.train_labels.tolist() == [0, 0, 1]
    assert (images.mean, images.policy, images.shape) == (IMAGENET_MEAN, "imagenet", (3, 32, 32))


def test_a_folder_of_classes_by_its_path(tmp_path: Path) -> None:
    files.write_tree(
        tmp_path, {"train": {"ant": 1, "bee": 1, "cat": 2}, "val": {"bee": 1}, "test": {"cat": 2, "ant": 1}}
    )
    images = load_images(str(tmp_path))
    # the test part lacks the bee, and its cat is still class 2
    assert images.test_labels.tolist() == [0, 2, 2]
    assert (images.shape, images.padding, images.flips, images.on_disk) == ((3, 224, 224), 28, True, True)
    assert load_images(str(tmp_path)) is images


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_tree(tmp_path, {"train": {"ant": 1}, "test": {"ant": 1}})
    monkeypatch.chdir(tmp_path)
    images = load_images(".", resolution=8)
    assert images.train.batch(files.keys(0)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("name", [name for name in DATA_SETS if name != "digits"])
def test_what_is_missing_is_said_once_with_every_way_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_images(name, tmp_path / "empty")
    text, source = str(caught.value), SOURCES[name]
    for part in (
        source.title,
        source.page,
        source.layout,
        "--data-root",
        str(tmp_path / "empty"),
        str(tmp_path / "cache"),
    ):
        assert part in text
    assert ("no route to host" in text) == (source.downloads == "at once")
    assert ("download=True" in text) == (source.downloads == "on request")
    assert "\n" not in text


def test_without_a_root_the_error_says_that_none_was_given() -> None:
    with pytest.raises(UserError, match=r"CIFAR-10 not found \(no --data-root given\)"):
        load_images("cifar10")


def test_the_cache_is_looked_in_last(tmp_path: Path) -> None:
    files.write_cifar(tmp_path / "cache")
    assert len(load_images("cifar10", tmp_path / "empty").train) == 40


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "test_batch").unlink(), "not found or corrupted"),
        (
            lambda folder: (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:900]),
            "truncated",
        ),
        (lambda folder: (folder / "data_batch_3").write_bytes(b""), "Ran out of input"),
        (lambda folder: (folder / "data_batch_3").write_bytes(pickle.dumps({"labels": [1]})), "data"),
    ],
)
def test_damaged_files_are_said_to_be_damaged_and_nothing_is_downloaded(tmp_path: Path, damage, said: str) -> None:
    files.write_cifar(tmp_path)
    damage(tmp_path / "cifar-10-batches-py")
    with pytest.raises(UserError, match="incomplete or damaged") as caught:
        load_images("cifar10", tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_labels_that_do_not_fit_the_images(tmp_path: Path) -> None:
    files.write_cifar(tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    batch.write_bytes(pickle.dumps({"data": files.random_bytes(8, 3072), "labels": [0] * 7}))
    with pytest.raises(UserError, match=r"CIFAR-10 in .*training part.* 40 and 39 entries"):
        load_images("cifar10", tmp_path)


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    files.write_cifar(tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(pickle.dumps({"data": files.random_bytes(2, 3072), "labels": [0, 10]}))
    with pytest.raises(UserError, match=r"test part: labels run from 0 to 10, and the 10 classes from 0 to 9"):
        load_images("cifar10", tmp_path)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, 2, 4, 4, dtype=torch.uint8)],
)
def test_images_of_another_shape_or_type(images: torch.Tensor) -> None:
    with pytest.raises(UserError, match="must be uint8 of shape"):
        checked("some", images, torch.zeros(2, dtype=torch.int64), 10)


def test_listed_images_that_are_missing(tmp_path: Path) -> None:
    files.write_pets(tmp_path)
    gone = tmp_path / "oxford-iiit-pet" / "images" / "american_bulldog_2.jpg"
    gone.unlink()
    with pytest.raises(UserError, match=f"1 of the 4 images that it lists are missing, first {gone}"):
        load_images("pets", tmp_path)


def test_an_annotation_that_is_no_number(tmp_path: Path) -> None:
    files.write_pets(tmp_path)
    (tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("Abyssinian_4 one 1 1\n")
    with pytest.raises(UserError, match=r"Oxford-IIIT Pet in .* is incomplete or damaged"):
        load_images("pets", tmp_path)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"train": {"ant": 1}}, "must have train/ and test/ or val/"),
        ({"test": {"ant": 1}}, "must have train/ and test/ or val/"),
        ({"train": {"ant": 1}, "test": {"bee": 1}}, "has the class 'bee', which"),
    ],
)
def test_folders_that_are_no_folders_of_classes(tmp_path: Path, parts: dict[str, dict[str, int]], said: str) -> None:
    files.write_tree(tmp_path, parts)
    with pytest.raises(UserError, match=said):
        load_images(str(tmp_path))


def test_a_class_without_images(tmp_path: Path) -> None:
    files.write_tree(tmp_path, {"train": {"ant": 1}, "test": {"ant": 1}})
    (tmp_path / "train" / "bee").mkdir()
    with pytest.raises(UserError, match=r"no folder of classes: .*bee"):
        load_images(str(tmp_path))


def test_names_and_paths_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        load_images("cifar-10")
    with pytest.raises(UserError, match="there is no folder"):
        load_images(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="at least 1, not 0"):
        load_images("digits", resolution=0)


def test_mean_and_deviation_are_those_of_the_definition() -> None:
    images = (
        torch.from_numpy(files.random_bytes(50, 3, 7, 5)) // torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]
    )
    mean, std = mean_and_deviation(images)
    values = images.double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(values.mean(1).tolist(), rel=1e-14)
    assert std == pytest.approx(values.std(1, correction=0).tolist(), rel=1e-12)
    order = torch.randperm(50)
    assert mean_and_deviation(images[order]) == (mean, std)


def test_the_second_call_reads_nothing_again(tmp_path: Path) -> None:
    files.write_cifar(tmp_path)
    first = load_images("cifar10", tmp_path)
    assert load_images("cifar10", str(tmp_path)) is first
    assert load_images("cifar10", tmp_path, resolution=64).train.images.data_ptr() == first.train.images.data_ptr()


@pytest.mark.parametrize(("resolution", "padding"), [(64, 8), (16, 2), (31, 4)])
def test_small_images_are_resized_batch_by_batch(tmp_path: Path, resolution: int, padding: int) -> None:
    pixels, _ = files.write_cifar(tmp_path)
    images = load_images("cifar10", tmp_path, resolution=resolution)
    assert (images.shape, images.padding) == ((3, resolution, resolution), padding)
    batch = images.train.batch(files.keys(3, 5))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(pixels[[3, 5]]).double(), size=resolution, mode="bilinear", antialias=True
    )
    assert batch.dtype == torch.uint8
    assert float((batch.double() - expected).abs().max()) <= 1.5


def test_batches_follow_the_plan(tmp_path: Path) -> None:
    files.write_cifar(tmp_path)
    part = load_images("cifar10", tmp_path).train
    plan = [(files.keys(3, 1), None), (files.keys(2), files.keys(7))]
    assert [batch.tolist() for batch in part.batches(plan)] == [part.images[[3, 1]].tolist(), part.images[[2]].tolist()]
    assert torch.equal(part.to("cpu").batch(files.keys(4)), part.images[[4]])


PUBLISHED = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_data_have_the_published_mean_and_deviation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.forget()
    monkeypatch.undo()  # the folders of this machine, and torchvision's own checks
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", files.no_network)
    monkeypatch.setattr("torchvision.datasets.MNIST", files.no_network)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", files.no_network)
    try:
        images = load_images(name)
    except UserError as error:
        pytest.skip(str(error))
    assert images.mean == pytest.approx(PUBLISHED[name][0], abs=6e-5)
    assert images.std == pytest.approx(PUBLISHED[name][1], abs=6e-5)
