"""Shake-Shake 26 2×Wd (Gastaldi, 2017): three stages of four blocks of two branches, W-2W-4W channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatwise.lab.models.initial import authors_head, he_normal
from flatwise.lab.models.shake import ShakeShake


class Branch(nn.Sequential):
    """ReLU, 3×3 convolution, normalisation, and the same once more."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )


class Shortcut(nn.Module):
    """Half the channels from the image, half from the image shifted by a pixel, each through a 1×1 convolution.

    Section 2.1.1 of the paper: with stride 2, the two halves see different pixels.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.straight = nn.Conv2d(channels_in, channels_out // 2, 1, bias=False)
        self.shifted = nn.Conv2d(channels_in, channels_out - channels_out // 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the shortcut.

        Args:
            inputs: (batch, channels_in, height, width).

        Returns:
            (batch, channels_out, height / stride, width / stride).
        """
        moved = functional.pad(inputs, (0, 1, 0, 1))[:, :, 1:, 1:]
        straight, shifted = (x[:, :, :: self.stride, :: self.stride] for x in (inputs, moved))
        joined: Tensor = self.norm(torch.cat([self.straight(straight), self.shifted(shifted)], dim=1))
        return joined


class Block(nn.Module):
    """Two branches, mixed at random, beside the shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = Branch(channels_in, channels_out, stride)
        self.second = Branch(channels_in, channels_out, stride)
        self.mix = ShakeShake()
        self.shortcut = Shortcut(channels_in, channels_out, stride) if channels_in != channels_out else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block.

        Args:
            inputs: (batch, channels_in, height, width).

        Returns:
            (batch, channels_out, height / stride, width / stride).
        """
        shortcut: Tensor = self.shortcut(inputs)
        mixed: Tensor = self.mix(self.first(inputs), self.second(inputs))
        return shortcut + mixed


class ShakeShakeNet(nn.Module):
    """A convolution of 16 channels, three stages, and a linear layer on the mean over the image.

    Args:
        blocks: blocks in each stage; 4 are 26 layers.
        width: W, channels of each branch in the first stage.
        channels: channels of the images.
        classes: number of classes.
    """

    def __init__(self, blocks: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        stages: list[nn.Module] = []
        before = 16
        for stage, wider in enumerate((width, 2 * width, 4 * width)):
            for block in range(blocks):
                stages.append(Block(before, wider, stride=2 if stage > 0 and block == 0 else 1))
                before = wider
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, classes).
        """
        hidden = functional.relu(self.stages(self.stem_norm(self.stem(images))))
        logits: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return logits


def shake_shake_net(blocks: int, width: int, channels: int, classes: int) -> nn.Module:
    """Build a Shake-Shake network, with He's initialisation and the authors' last layer.

    Args:
        blocks: blocks in each stage, (depth - 2) / 6.
        width: W.
        channels: channels of the images.
        classes: number of classes.

    Returns:
        The network.
    """
    network = ShakeShakeNet(blocks, width, channels, classes)
    he_normal(network)
    authors_head(network.head)
    return network
