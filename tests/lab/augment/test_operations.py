"""Operations and tables against torchvision's AutoAugment, image by image, and against Pillow."""

from __future__ import annotations

import pytest
import torch
from tests.lab.augment.conftest import images_of

from flatwise.lab.augment.operations import SIGNED, Operation, operation, perform
from flatwise.lab.augment.policies import POLICIES
from flatwise.lab.augment.policy import LEVELS, RAND_LEVEL, RAND_LEVELS, RAND_OPERATIONS, WITHOUT_STRENGTH

torchvision = pytest.importorskip("torchvision", reason="needs flatwise[lab]")
from torchvision.transforms import autoaugment, functional, v2  # noqa: E402
from torchvision.transforms.functional import InterpolationMode  # noqa: E402

PEER = {
    "cifar": autoaugment.AutoAugmentPolicy.CIFAR10,
    "svhn": autoaugment.AutoAugmentPolicy.SVHN,
    "imagenet": autoaugment.AutoAugmentPolicy.IMAGENET,
}


def all_operations(height: int, width: int) -> set[Operation]:
    steps = {(name, level, LEVELS) for table in POLICIES.values() for pair in table for name, _, level in pair}
    steps |= {
        (name, None if name in WITHOUT_STRENGTH else RAND_LEVEL, RAND_LEVELS)
        for name in RAND_OPERATIONS
        if name != "Identity"
    }
    return {operation(*step, height, width, negative) for step in steps for negative in (False, True)}


@pytest.mark.parametrize("policy", list(POLICIES))
def test_the_sub_policies_are_torchvisions(policy: str) -> None:
    assert list(POLICIES[policy]) == autoaugment.AutoAugment(PEER[policy]).policies


@pytest.mark.parametrize("levels", [LEVELS, RAND_LEVELS, 31])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (224, 160)])
def test_the_strengths_are_torchvisions(levels: int, height: int, width: int) -> None:
    space = autoaugment.AutoAugment()._augmentation_space(levels, (height, width))
    assert set(space) - WITHOUT_STRENGTH == set(RAND_OPERATIONS) - WITHOUT_STRENGTH - {"Identity"}
    for name, (strengths, has_sign) in space.items():
        assert (name in SIGNED) == has_sign
        for level in range(levels) if strengths.ndim else ():
            expected = float(strengths[level])
            assert operation(name, level, levels, height, width, False).strength == expected
            assert operation(name, level, levels, height, width, True).strength == (-expected if has_sign else expected)


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 21, 34), (1, 8, 8)])
def test_every_operation_gives_torchvisions_bits(channels: int, height: int, width: int) -> None:
    """Bit for bit those of its second generation; the first rounds three of the operations in another way."""
    second = v2.AutoAugment()
    images = images_of(6, channels, height, width)
    before = images.clone()
    for one in sorted(all_operations(height, width)):
        strength = one.strength / 255 if one.name == "Solarize" else one.strength  # v2 counts from 0 to 1
        for image, result in zip(images, perform(images, one), strict=True):
            expected = second._apply_image_or_video_transform(
                image, one.name, strength, InterpolationMode.NEAREST, second._fill
            )
            assert torch.equal(result, expected), one
            first = autoaugment._apply_op(image, one.name, one.strength, InterpolationMode.NEAREST, None)
            difference = int((first.to(torch.int16) - result).abs().max())
            assert difference <= (1 if one.name in ("AutoContrast", "Color", "Sharpness") else 0), one
    assert torch.equal(images, before)


# Pillow rounds blends of two images in another way; its shear has another corner, so that edges move by a pixel.
ROUNDED = ("AutoContrast", "Color", "Contrast", "Sharpness")
SHEARED = ("ShearX", "ShearY")


@pytest.mark.parametrize("name", sorted({one.name for one in all_operations(32, 32)}))
def test_every_operation_does_what_pillow_does(name: str) -> None:
    images = images_of(8)
    for one in sorted(all_operations(32, 32)):
        if one.name != name:
            continue
        for image, result in zip(images, perform(images, one), strict=True):
            picture = functional.to_pil_image(image)
            done = autoaugment._apply_op(picture, one.name, one.strength, InterpolationMode.NEAREST, None)
            difference = (functional.pil_to_tensor(done).to(torch.int16) - result).abs()
            if name in SHEARED:
                assert float((difference > 0).to(torch.float64).mean()) < 0.1, one
            else:
                assert int(difference.max()) <= (1 if name in ROUNDED else 0), one
