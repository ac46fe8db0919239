"""Where each named data set comes from, where it is looked for, and the one error that says so when it is not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flatwise.errors import UserError

SYSTEM_FOLDER = Path("/usr/share/datasets")
CACHE_FOLDER = Path("~/.cache/flatwise")


@dataclass(frozen=True)
class Source:
    """What is known of a data set before one of its files is open.

    Attributes:
        title: its published name.
        page: address of its official page.
        layout: the files that are looked for, below the folder of --data-root.
        marker: the file or folder that is only there where the data set is.
        below: subfolders of a candidate in which the marker may be; "" is the candidate itself.
        reader: torchvision's class for it, "" where it is a folder of classes.
        downloads: "at once" (torchvision, when it is missing), "on request" (gigabytes), or "no" (the owners give it
            to people only, or no longer at all).
        system: its folder below the system's data sets.
    """

    title: str
    page: str
    layout: str
    marker: str
    below: tuple[str, ...] = ("",)
    reader: str = ""
    downloads: str = "at once"
    system: str = ""


SOURCES = {
    "cifar10": Source(
        title="CIFAR-10",
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        layout="cifar-10-batches-py/ with data_batch_1 to 5, test_batch and batches.meta",
        marker="cifar-10-batches-py",
        reader="CIFAR10",
    ),
    "cifar100": Source(
        title="CIFAR-100",
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        layout="cifar-100-python/ with train, test and meta",
        marker="cifar-100-python",
        reader="CIFAR100",
    ),
    "svhn": Source(
        title="SVHN with its extra images",
        page="http://ufldl.stanford.edu/housenumbers",
        layout="train_32x32.mat, extra_32x32.mat and test_32x32.mat",
        marker="extra_32x32.mat",
        below=("", "svhn", "SVHN"),
        reader="SVHN",
    ),
    "svhn-core": Source(
        title="SVHN",
        page="http://ufldl.stanford.edu/housenumbers",
        layout="train_32x32.mat and test_32x32.mat",
        marker="train_32x32.mat",
        below=("", "svhn", "SVHN"),
        reader="SVHN",
    ),
    "fashion-mnist": Source(
        title="Fashion-MNIST",
        page="https://github.com/zalandoresearch/fashion-mnist",
        layout="FashionMNIST/raw/ with the four IDX files, packed or not",
        marker="",
        # Its files have the names of MNIST's: in the folder itself they are taken for Fashion-MNIST, here only.
        below=("FashionMNIST/raw", ""),
        reader="FashionMNIST",
        system="fashion-mnist",
    ),
    "mnist": Source(
        title="MNIST",
        page="http://yann.lecun.com/exdb/mnist",
        layout="MNIST/raw/ with the four IDX files, packed or not",
        marker="",
        below=("MNIST/raw",),
        reader="MNIST",
        system="mnist",
    ),
    "imagenet": Source(
        title="ImageNet (ILSVRC 2012)",
        page="https://www.image-net.org/download.php",
        layout="train/ and val/ (or imagenet/train/ and imagenet/val/), each with one folder per class, n01440764/ and "
        "so on; torchvision.datasets.ImageNet('DIR', split='val') sorts the validation archive into folders",
        marker="train",
        below=("imagenet", "ILSVRC2012", ""),
        downloads="no",
    ),
    "aircraft": Source(
        title="FGVC Aircraft",
        page="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        layout="fgvc-aircraft-2013b/data/ with images/, variants.txt, images_variant_trainval.txt and "
        "images_variant_test.txt",
        marker="fgvc-aircraft-2013b",
        reader="FGVCAircraft",
        downloads="on request",
    ),
    "flowers": Source(
        title="Oxford 102 Flowers",
        page="https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        layout="flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        marker="flowers-102",
        reader="Flowers102",
        downloads="on request",
    ),
    "pets": Source(
        title="Oxford-IIIT Pet",
        page="https://www.robots.ox.ac.uk/~vgg/data/pets",
        layout="oxford-iiit-pet/ with images/ and annotations/",
        marker="oxford-iiit-pet",
        reader="OxfordIIITPet",
        downloads="on request",
    ),
    "cars": Source(
        title="Stanford Cars",
        page="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        layout="stanford_cars/ with cars_train/, cars_test/, cars_test_annos_withlabels.mat and devkit/",
        marker="stanford_cars",
        reader="StanfordCars",
        downloads="no",
    ),
    "birdsnap": Source(
        title="Birdsnap",
        page="http://thomasberg.org",
        layout="birdsnap/train/ and birdsnap/test/, each with one folder per species",
        marker="train",
        below=("birdsnap",),
        downloads="no",
    ),
    "food101": Source(
        title="Food-101",
        page="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        layout="food-101/ with images/ and meta/",
        marker="food-101",
        reader="Food101",
        downloads="on request",
    ),
}


def candidates(source: Source, root: Path | None) -> Iterator[Path]:
    """List the folders in which a data set may be, in the order in which they are tried.

    Args:
        source: the data set.
        root: what the user gave, if anything.

    Yields:
        Folders.
    """
    if root is not None:
        yield from (root / below for below in source.below)
    if source.system:
        yield SYSTEM_FOLDER / source.system
    yield from (CACHE_FOLDER.expanduser() / below for below in source.below)


def download_folder(root: Path | None) -> Path:
    """Say where a data set goes that is downloaded.

    Args:
        root: what the user gave, if anything.

    Returns:
        The folder.
    """
    return root if root is not None else CACHE_FOLDER.expanduser()


class MissingDataError(UserError):
    """A data set that is not there; the text says where it was looked for, and the ways to provide it.

    Args:
        source: the data set.
        root: what the user gave, if anything.
        failure: why the download failed, where one was tried.
    """

    everywhere = False

    def __init__(self, source: Source, root: Path | None, failure: Exception | None = None) -> None:
        looked = ", ".join(dict.fromkeys(str(folder) for folder in candidates(source, root)))
        ways = [
            f"its files from {source.page}, laid out as {source.layout}, in a folder DIR that --data-root DIR names"
        ]
        if source.system:
            ways.append(f"the files alone in {SYSTEM_FOLDER / source.system}")
        if source.downloads == "on request":
            call = f"from torchvision.datasets import {source.reader} as D; D('DIR', download=True)"
            ways.append(f'its download, python -c "{call}", and --data-root DIR')
        if failure is not None:
            target = download_folder(root)
            ways.append(f"a connection, so that torchvision downloads it (tried into {target}: {one_line(failure)})")
        counted = "; ".join(f"({number}) {way}" for number, way in enumerate(ways, start=1))
        given = "" if root is not None else " (no --data-root given)"
        super().__init__(f"{source.title} not found{given}: looked in {looked}. Ways to provide it: {counted}")


class DamagedDataError(UserError):
    """A data set that is there and cannot be read.

    Args:
        source: the data set.
        folder: where it was found.
        failure: what its reader said.
    """

    everywhere = False

    def __init__(self, source: Source, folder: Path, failure: Exception) -> None:
        super().__init__(
            f"{source.title} in {folder} is incomplete or damaged ({one_line(failure)}): it must have "
            f"{source.layout}; its page is {source.page}"
        )


def one_line(error: Exception) -> str:
    """Write what an error says in one line.

    Args:
        error: any.

    Returns:
        Its text, or its name where it has none.
    """
    return " ".join(str(error).split()) or type(error).__name__
