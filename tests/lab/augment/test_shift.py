"""The basic augmentation against a loop over single images."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from flatwise.lab.augment import augment
from flatwise.lab.data import load_data


@pytest.mark.parametrize("flips", [False, True])
def test_every_image_is_a_shifted_and_perhaps_mirrored_original(flips: bool) -> None:
    images = torch.randn(64, 1, 8, 8)
    moved = augment(images, 2, flips, torch.Generator().manual_seed(0))
    seen = set()
    for image, result in zip(images, moved, strict=True):
        padded = functional.pad(image[None], (2, 2, 2, 2), mode="replicate")[0]
        candidates = {
            (row, column, mirrored): crop.flip(-1) if mirrored else crop
            for row in range(5)
            for column in range(5)
            for mirrored in ((False, True) if flips else (False,))
            for crop in [padded[:, row : row + 8, column : column + 8]]
        }
        matches = [key for key, candidate in candidates.items() if torch.equal(candidate, result)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {key[2] for key in seen} == ({False, True} if flips else {False})
    assert {key[0] for key in seen} == set(range(5))


def test_the_generator_alone_decides() -> None:
    images = torch.randn(8, 1, 8, 8)
    state = torch.get_rng_state()
    first = augment(images, 1, True, torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, augment(images, 1, True, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(images, 1, True, torch.Generator().manual_seed(2)))


def test_digits_are_never_mirrored() -> None:
    assert not load_data("digits").flips
