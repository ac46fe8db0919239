"""mixup and CutMix against their formulas."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flatwise.errors import UserError
from flatwise.lab.augment import mix
from flatwise.lab.augment.mixing import cutmix_box

CLASSES = 12


def batch() -> tuple[Tensor, Tensor]:
    """Each label occurs once, so the targets name the partner."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(CLASSES, 3, 10, 14, generator=generator), torch.randperm(CLASSES, generator=generator)


def partners_and_share(targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Read each image's partner, and the share that it kept, off its targets."""
    own = targets.gather(1, labels[:, None])[:, 0]
    others = targets.scatter(1, labels[:, None], 0)
    # the image whose label has the rest; itself, where nothing is left
    rest, other = others.max(1)
    place = torch.empty_like(labels).scatter_(0, labels, torch.arange(CLASSES))
    return torch.where(rest > 0, place[other], torch.arange(CLASSES)), own


@pytest.mark.parametrize("key", range(30))
def test_mixup_is_one_share_of_each_image_and_the_rest_of_its_partner(key: int) -> None:
    images, labels = batch()
    mixed, targets = mix(images, labels, CLASSES, mixup=0.7, key=key)
    partners, own = partners_and_share(targets, labels)
    assert sorted(partners.tolist()) == list(range(CLASSES))
    moved = partners != torch.arange(CLASSES)
    share = own[moved][0]
    assert bool((own[moved] == share).all())
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[partners])
    torch.testing.assert_close(targets.sum(1), torch.ones(CLASSES))


@pytest.mark.parametrize("key", range(30))
def test_cutmixs_share_is_the_exact_part_of_the_pixels(key: int) -> None:
    images, labels = batch()
    mixed, targets = mix(images, labels, CLASSES, cutmix=1.0, key=key)
    partners, own = partners_and_share(targets, labels)
    for place in range(CLASSES):
        kept = (mixed[place] == images[place]).all(0)
        taken = (mixed[place] == images[partners[place]]).all(0)
        assert bool((kept | taken).all())
        if partners[place] != place:
            assert float(own[place]) == pytest.approx(float(kept.to(torch.float64).mean()), abs=1e-6)
            rows, columns = taken.any(1).nonzero(), taken.any(0).nonzero()
            if len(rows):  # one box
                assert bool(taken[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all())


def test_the_box_is_yuns() -> None:
    for seed in range(200):
        share, height, width = random.Random(seed).random(), 32, 20
        row, column = (draws := random.Random(seed + 1000)).randrange(height), draws.randrange(width)
        cut_height, cut_width = int(height * (1 - share) ** 0.5), int(width * (1 - share) ** 0.5)
        expected = (
            max(row - cut_height // 2, 0), min(row + cut_height // 2, height),
            max(column - cut_width // 2, 0), min(column + cut_width // 2, width),
        )  # fmt: skip
        assert cutmix_box(random.Random(seed + 1000), share, height, width) == expected


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_share_is_from_beta(alpha: float) -> None:
    count = 4000
    images, labels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([0, 1])
    shares = []
    for key in range(count):
        targets = mix(images, labels, 2, mixup=alpha, key=key)[1]
        if float(targets[0, 0]) < 1:
            shares.append(float(targets[0, 0]))
    assert abs(len(shares) - count / 2) < 5 * (count / 4) ** 0.5  # in the other half the partner is the image itself
    found = torch.tensor(shares, dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(found.mean()) == pytest.approx(0.5, abs=5 * (variance / len(shares)) ** 0.5)
    assert float(found.var()) == pytest.approx(variance, rel=0.12)


def test_partners_are_spread_evenly() -> None:
    images, labels = batch()
    counts = torch.zeros(CLASSES, CLASSES)
    for key in range(3000):
        partners, _ = partners_and_share(mix(images, labels, CLASSES, mixup=1.0, key=key)[1], labels)
        counts[torch.arange(CLASSES), partners] += 1
    expected = 3000 / CLASSES
    assert float((counts - expected).abs().max()) < 5 * (expected * (1 - 1 / CLASSES)) ** 0.5


def test_alpha_zero_is_off() -> None:
    images, labels = batch()
    mixed, targets = mix(images, labels, CLASSES, key=3)
    assert mixed is images
    assert torch.equal(targets, functional.one_hot(labels, CLASSES).to(torch.float32))


@pytest.mark.parametrize("alphas", [{"mixup": 0.5}, {"cutmix": 0.5}])
def test_the_key_alone_decides_and_nothing_else_changes(alphas: dict[str, float]) -> None:
    images, labels = batch()
    before, state, python_state = images.clone(), torch.get_rng_state(), random.getstate()
    first = mix(images, labels, CLASSES, key=8, **alphas)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    again = mix(images.contiguous(memory_format=torch.channels_last), labels, CLASSES, key=8, **alphas)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], mix(images, labels, CLASSES, key=9, **alphas)[1])


@pytest.mark.parametrize("alphas", [{"mixup": -1.0}, {"cutmix": -0.1}, {"mixup": 1.0, "cutmix": 1.0}])
def test_alphas_that_cannot_be_meant_are_refused(alphas: dict[str, float]) -> None:
    with pytest.raises(UserError, match="positive alpha"):
        mix(*batch(), CLASSES, key=0, **alphas)
