"""The random crop: the published generator, torchvision's rule, and nothing but the key decides."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest
from torchvision.transforms import RandomResizedCrop

from flatwise.lab.sets.crop import FIRST_DRAW, draw_bits, inception_box, shorter_side, uniform


def test_the_generator_is_splitmix64() -> None:
    # the outputs that are published for the seed 1234567
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [draw_bits(1234567, number) for number in range(5)] == published
    assert draw_bits(-1, 0) == draw_bits((1 << 64) - 1, 0)
    assert uniform(1234567, 0) == pytest.approx(6457827717110365317 / 2**64, abs=2**-52)


def test_draws_are_uniform() -> None:
    for number in (0, FIRST_DRAW):
        assert kstest([uniform(key, number) for key in range(4000)], "uniform").pvalue > 1e-4
    assert kstest([uniform(7, number) for number in range(4000)], "uniform").pvalue > 1e-4


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (64, 64), (600, 310), (30, 20), (1, 1)])
def test_the_box_is_torchvisions_for_the_same_draws(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.empty(3, height, width)
    attempts = 0
    for key in range(-50, 50):
        asked: list[str] = []

        def draw(name: str, key: int = key, asked: list[str] = asked) -> float:
            asked.append(name)
            attempt = asked.count("area") - 1
            return uniform(key, FIRST_DRAW + 4 * attempt + ("area", "ratio", "left", "top").index(name))

        def flat(self: torch.Tensor, low: float, high: float, asked: list[str] = asked, draw=draw) -> torch.Tensor:
            # torchvision asks for the area, then for the ratio, until the box fits
            name = "ratio" if asked and asked[-1] == "area" else "area"
            return torch.tensor([float(low) + (float(high) - float(low)) * draw(name)], dtype=torch.float64)

        def whole(low: int, high: int, size: tuple[int], asked: list[str] = asked, draw=draw) -> torch.Tensor:
            return torch.tensor([low + int((high - low) * draw("left" if asked[-1] == "top" else "top"))])

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", flat)
            patch.setattr(torch, "randint", whole)
            top, left, high, wide = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        box = inception_box(width, height, key)
        # torchvision takes the logarithm in float32: a side may round to the other pixel
        assert box == pytest.approx((left, top, wide, high), abs=1)
        assert 0 <= box[0] <= width - box[2] < width
        assert 0 <= box[1] <= height - box[3] < height
        attempts += asked.count("area")
    assert attempts >= 100


def test_extreme_shapes_take_torchvisions_centre() -> None:
    for width, height in ((1000, 10), (10, 1000), (200, 1), (1, 200)):
        image = torch.empty(3, height, width)
        top, left, high, wide = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        assert inception_box(width, height, 3) == (left, top, wide, high)
    assert shorter_side(224) == 256
