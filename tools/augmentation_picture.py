"""The picture of docs/augmentation.md: the same images under each augmentation.

    python tools/augmentation_picture.py                    # Fashion-MNIST, beside squares of a photograph
    python tools/augmentation_picture.py --out picture.png

Each row has a fixed key for each column, so that a shift or a mirror is the same in every row that has it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional

from flatwise.lab.augment import build_pipeline, mix, sample_keys
from flatwise.lab.images import load_images

ROOT = Path(__file__).parent.parent
COLUMNS = 7
ROWS = (
    "none", "basic", "cutout", "basic+cutout", "autoaugment", "randaugment", "inception", "mixup", "cutmix",
)  # fmt: skip


@dataclass(frozen=True)
class Photo:
    """What the pipeline asks of a data set."""

    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    flips: bool = True
    padding: int = 4
    policy: str = "cifar"


def squares() -> Tensor:
    """Cut seven squares of 32 x 32 pixels out of a photograph that comes with scikit-learn."""
    photo = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None].to(torch.float32)
    small = functional.interpolate(photo, scale_factor=0.2, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
    places = ((0, 8), (12, 40), (28, 26), (40, 8), (44, 60), (44, 92), (20, 96))
    return torch.stack([small[:, top : top + 32, left : left + 32] for top, left in places])


def rows(images: Tensor, facts: object, seed: int) -> list[Tensor]:
    """Augment the images in every way; pixels from 0 to 1, (columns, channels, height, width) for each row."""
    keys = sample_keys(seed, 0, torch.arange(len(images)))
    done = []
    for row in ROWS:
        mixing = row in ("mixup", "cutmix")
        names = [] if mixing or row == "none" else row.split("+")
        result = build_pipeline(names, facts, cutout=images.shape[-1] // 2)(images, keys)  # type: ignore[arg-type]
        if mixing:
            result, _ = mix(result, torch.arange(len(images)), len(images), **{row: 1.0}, key=seed)  # type: ignore[arg-type]
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (facts.mean, facts.std))  # type: ignore[attr-defined]
        done.append((result * std + mean).clamp(0, 1))
    return done


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "augmentation.png")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--seed", type=int, default=2)
    settings = parser.parse_args()
    clothes = load_images("fashion-mnist", settings.data_root)
    left = rows(clothes.train.batch(torch.arange(COLUMNS)), clothes, settings.seed)
    right = rows(squares(), Photo(), settings.seed)
    figure, axes = plt.subplots(len(ROWS), 2 * COLUMNS, figsize=(2 * COLUMNS * 0.75 + 1.6, len(ROWS) * 0.78))
    for name, line, grey, colour in zip(ROWS, axes, left, right, strict=True):
        for axis, image in zip(line, (*grey, *colour), strict=True):
            pixels = image.permute(1, 2, 0)
            axis.imshow(
                pixels[..., 0] if pixels.shape[-1] == 1 else pixels,
                cmap="gray",
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name.replace("+", "\n+ "), rotation=0, ha="right", va="center", fontsize=10)
    figure.subplots_adjust(left=0.115, right=0.995, top=0.995, bottom=0.005, wspace=0.06, hspace=0.06)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.out, dpi=80, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
