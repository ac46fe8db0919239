"""Small files in the formats of the published data sets, made by the tests that read them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from flatwise.lab import data, images
from flatwise.lab.sets import sources


def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what a test writes is there: no system folder, no cache, no network, no checksum of the published files."""
    monkeypatch.setattr(sources, "SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setattr(sources, "CACHE_FOLDER", tmp_path / "cache")
    for module in ("cifar", "svhn", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, _md5: Path(path).is_file())
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", no_network)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", no_network)
    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    forget()


def forget() -> None:
    """Read everything again."""
    for cached in (data.load_data, images._small_images, images._large_images, images._folder_images):
        cached.cache_clear()


def no_network(*_: object, **__: object) -> None:
    raise RuntimeError("Error downloading:\nno route to host")


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_cifar(root: Path, classes: int = 10) -> tuple[np.ndarray, list[int]]:
    """Write CIFAR-10 or CIFAR-100 with a few images; return the training images and labels."""
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [f"data_batch_{number}" for number in range(1, 6)] if classes == 10 else ["train"]
    label, meta = ("labels", "batches.meta") if classes == 10 else ("fine_labels", "meta")
    every, labels = [], []
    for count, name in enumerate([*names, "test_batch" if classes == 10 else "test"]):
        pixels, found = random_bytes(8, 3072, seed=count), [(3 * count + value) % classes for value in range(8)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, label: found}))
        if "test" not in name:
            every.append(pixels)
            labels += found
    key = "label_names" if classes == 10 else "fine_label_names"
    (folder / meta).write_bytes(pickle.dumps({key: [f"class {value}" for value in range(classes)]}))
    return np.vstack(every).reshape(-1, 3, 32, 32), labels


def write_svhn(root: Path, *splits: str) -> dict[str, np.ndarray]:
    """Write SVHN's files, whose images have their number last and whose label of the digit 0 is 10."""
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for count, split in enumerate(splits):
        written[split] = random_bytes(32, 32, 3, 10 + count, seed=count)
        digits = np.arange(10 + count) % 10
        labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        savemat(root / f"{split}_32x32.mat", {"X": written[split], "y": labels})
    return written


def write_image(path: Path, color: tuple[int, ...] | int = (200, 30, 60), size: tuple[int, int] = (48, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "L" if isinstance(color, int) else {3: "RGB", 4: "RGBA"}[len(color)]
    Image.new(mode, size, color).save(path)
    return path


def write_tree(root: Path, parts: dict[str, dict[str, int]]) -> Path:
    """Write folders of classes: the number of images of each class of each part."""
    for part, classes in parts.items():
        for number, (name, count) in enumerate(classes.items()):
            for image in range(count):
                write_image(root / part / name / f"{image:03d}.png", (40 * number, 10 * image, 128))
    return root


def write_aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nA340-300\nDC 10\n")
    lines = {"trainval": ["0000001 A340-300", "0000002 DC 10", "0000003 707-320"], "test": ["0000004 DC 10"]}
    for split, entries in lines.items():
        (folder / f"images_variant_{split}.txt").write_text("\n".join(entries) + "\n")
        for entry in entries:
            write_image(folder / "images" / f"{entry.split(' ')[0]}.jpg")


def write_flowers(root: Path) -> None:
    folder = root / "flowers-102"
    for number in range(1, 7):
        write_image(folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 102, 3, 4, 5, 6]])})
    savemat(
        folder / "setid.mat", {"trnid": np.array([[2, 1]]), "valid": np.array([[4, 5]]), "tstid": np.array([[3, 6]])}
    )


def write_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    entries = {
        "trainval": ["Abyssinian_1 1 1 1", "american_bulldog_2 2 2 1"],
        "test": ["american_bulldog_3 2 2 1", "Abyssinian_4 1 1 1"],
    }
    for split, lines in entries.items():
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            write_image(folder / "images" / f"{line.split(' ')[0]}.jpg")


def write_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kind = [("bbox_x1", "u1"), ("class", "u1"), ("fname", "O")]
    for split, path in (
        ("train", folder / "devkit" / "cars_train_annos.mat"),
        ("test", folder / "cars_test_annos_withlabels.mat"),
    ):
        rows = np.array([(1, 2, "00001.jpg"), (1, 1, "00002.jpg"), (1, 3, "00003.jpg")], dtype=kind)
        savemat(path, {"annotations": rows})
        for row in rows:
            write_image(folder / f"cars_{split}" / str(row["fname"]))
    names = np.array(["AM General Hummer", "Acura RL", "Acura TL"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})


def write_food(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, counts in (("train", 2), ("test", 1)):
        listed = {name: [f"{name}/{split}{number}" for number in range(counts)] for name in ("waffles", "apple_pie")}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for paths in listed.values():
            for path in paths:
                write_image(folder / "images" / f"{path}.jpg")


def keys(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
