"""Crops of random size against torchvision's rule and torchvision's resize."""

from __future__ import annotations

import math

import pytest
import torch
from tests.lab.augment.conftest import images_of

from flatwise.lab.augment import crop_boxes, sample_keys
from flatwise.lab.augment.inception import BOX_COLUMN, BOX_ROW, FIRST_TRY, TRIES, resize_boxes
from flatwise.lab.augment.keys import below, uniform


def slow_box(key: torch.Tensor, height: int, width: int) -> list[int]:
    """The rule of torchvision.transforms.RandomResizedCrop, for one image."""
    for number in range(TRIES):
        area, ratio = uniform(key, FIRST_TRY + 2 * number, FIRST_TRY + 2 * number + 1)[:, 0].tolist()
        area = (0.08 + 0.92 * area) * height * width
        ratio = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            top = int(below(key, BOX_ROW, height - tall + 1))
            return [top, int(below(key, BOX_COLUMN, width - wide + 1)), tall, wide]
    tall, wide = height, width
    if width / height < 3 / 4:
        tall = round(width / (3 / 4))
    elif width / height > 4 / 3:
        wide = round(height * (4 / 3))
    return [(height - tall) // 2, (width - wide) // 2, tall, wide]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 40), (6, 90), (90, 6), (1, 1)])
def test_the_boxes_follow_the_rule(height: int, width: int) -> None:
    keys = sample_keys(3, 0, torch.arange(200))
    boxes = crop_boxes(keys, height, width)
    assert boxes.T.tolist() == [slow_box(key[None], height, width) for key in keys]


def test_images_of_many_sizes_have_boxes_of_their_own() -> None:
    keys = sample_keys(3, 0, torch.arange(4))
    sizes = [(32, 32), (500, 375), (20, 300), (640, 480)]
    together = crop_boxes(keys, torch.tensor([h for h, _ in sizes]), torch.tensor([w for _, w in sizes]))
    assert together.T.tolist() == [slow_box(key[None], *size) for key, size in zip(keys, sizes, strict=True)]


def test_areas_and_places_are_spread_as_they_should() -> None:
    count = 50_000
    top, left, tall, wide = crop_boxes(sample_keys(0, 0, torch.arange(count)), 256, 256).to(torch.float64)
    # most of the first tries fit; those with an area below 3/4 always do, and are even over 8 to 75 %
    areas = tall * wide / 256**2
    small = areas[areas < 0.7]
    cells = torch.histc(small, bins=10, min=0.08, max=0.7)
    assert float((cells / cells.mean() - 1).abs().max()) < 0.08
    ratios = (wide / tall)[areas < 0.7].log()
    assert abs(float(ratios.mean())) < 0.01
    assert float(ratios.abs().max()) < math.log(4 / 3) + 0.05
    places = (top / (256 - tall).clamp(min=1))[tall < 200]
    assert abs(float(places.mean()) - 0.5) < 0.01
    assert bool((left + wide <= 256).all())


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 20)])
def test_the_boxes_are_enlarged_as_torchvision_does(channels: int, height: int, width: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = images_of(60, channels, height, width)
    boxes = crop_boxes(sample_keys(1, 1, torch.arange(60)), height, width)
    got = resize_boxes(images, boxes)
    for image, result, (top, left, tall, wide) in zip(images, got, boxes.T.tolist(), strict=True):
        floats = functional.resized_crop(image.to(torch.float32), top, left, tall, wide, [height, width])
        assert float((result - floats).abs().max()) < 0.501  # rounding, and the last bits of float32
        whole = functional.resized_crop(image, top, left, tall, wide, [height, width])
        assert int((result.to(torch.int16) - whole).abs().max()) <= 1


def test_the_whole_image_as_a_box_changes_nothing() -> None:
    images = images_of(5, 3, 17, 23)
    boxes = torch.tensor([[0, 0, 17, 23]] * 5).T
    assert torch.equal(resize_boxes(images, boxes), images)
