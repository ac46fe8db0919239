"""Mirror, crop and cutout against loops over single images, and their exact counts."""

from __future__ import annotations

import pytest
import torch
from tests.lab.augment.conftest import images_of
from torch.nn import functional

from flatwise.lab.augment import sample_keys
from flatwise.lab.augment.basic import COLUMN, CUTOUT_COLUMN, CUTOUT_ROW, MIRROR, ROW, cutout, mirror_and_crop
from flatwise.lab.augment.keys import below


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 9, 12)])
def test_each_image_is_mirrored_padded_and_cropped(
    flips: bool, padding: int, channels: int, height: int, width: int
) -> None:
    keys = sample_keys(1, 2, torch.arange(40))
    images = images_of(40, channels, height, width)
    got = mirror_and_crop(images, keys, flips=flips, padding=padding)
    rows, columns = (below(keys, draw, 2 * padding + 1).tolist() for draw in (ROW, COLUMN))
    for place, mirrored in enumerate(below(keys, MIRROR, 2).tolist()):
        row, column = rows[place], columns[place]
        crop = functional.pad(images[place], (padding,) * 4)[:, row : row + height, column : column + width]
        assert torch.equal(got[place], crop.flip(-1) if flips and mirrored else crop)


def test_shifts_and_mirrors_come_equally_often() -> None:
    """One marked pixel in the middle says where each image went; 40,000 images, fixed seed."""
    count = 40_000
    images = torch.zeros(count, 1, 5, 6, dtype=torch.uint8)
    images[:, :, 2, 2] = 255  # the mirror image has it in column 3
    got = mirror_and_crop(images, sample_keys(0, 0, torch.arange(count)), flips=True, padding=2).flatten(1)
    assert bool((got.sum(1) == 255).all())
    seen = torch.bincount(got.argmax(1), minlength=30).view(5, 6).to(torch.float64) / count
    # column 2 or 3, moved by -2..2: a share of 1/10 at the ends, 2/10 between
    expected = torch.tensor([1, 2, 2, 2, 2, 1]) / 10 * torch.ones(5, 1) / 5
    assert float((seen - expected).abs().max()) < 5 * (0.04 * 0.96 / count) ** 0.5


@pytest.mark.parametrize("side", [1, 4, 5, 16, 40])
def test_cutout_blanks_one_clipped_square_of_each_image(side: int) -> None:
    keys = sample_keys(0, 5, torch.arange(50))
    images = torch.randn(50, 3, 12, 15)
    got = cutout(images.clone(), keys, side)
    rows, columns = below(keys, CUTOUT_ROW, 12).tolist(), below(keys, CUTOUT_COLUMN, 15).tolist()
    for place in range(50):
        expected = images[place].clone()
        top, left = rows[place] - side // 2, columns[place] - side // 2
        expected[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
        assert torch.equal(got[place], expected)


def test_cutouts_centre_is_any_pixel_equally_often_and_each_image_has_its_own() -> None:
    count = 40_000
    got = cutout(torch.ones(count, 1, 4, 5), sample_keys(0, 0, torch.arange(count)), 1).flatten(1)
    assert bool(((got == 0).sum(1) == 1).all())
    share = (got == 0).to(torch.float64).mean(0)
    assert float((share - 0.05).abs().max()) < 5 * (0.05 * 0.95 / count) ** 0.5
