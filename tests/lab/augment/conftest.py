"""Images and facts that the tests of augmentation share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flatwise.lab.augment import sample_keys


@dataclass(frozen=True)
class Facts:
    mean: tuple[float, ...] = (0.5, 0.25, 0.4)
    std: tuple[float, ...] = (0.2, 0.3, 0.25)
    flips: bool = True
    padding: int = 4
    policy: str = "cifar"


def facts_of(channels: int, **changes: object) -> Facts:
    return Facts(**{"mean": Facts.mean[:channels], "std": Facts.std[:channels], **changes})  # type: ignore[arg-type]


def images_of(count: int, channels: int = 3, height: int = 32, width: int | None = None, seed: int = 0) -> Tensor:
    """Smooth and noisy images, dark and bright, so that equalize and autocontrast have work to do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, height, width or height)
    coarse = torch.nn.functional.interpolate(
        torch.rand((count, channels, 3, 3), generator=generator), size=shape[2:], mode="bilinear"
    )
    spread = torch.rand((count, channels, 1, 1), generator=generator)
    noise = torch.rand(shape, generator=generator) - 0.5
    return (255 * (coarse * spread + 0.1 * noise)).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def keys() -> Tensor:
    return sample_keys(0, 0, torch.arange(64))
