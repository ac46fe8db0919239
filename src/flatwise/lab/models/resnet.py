"""The CIFAR-style residual network (He et al., CVPR 2016, section 4.2): 6n + 2 layers, 16-32-64 channels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from flatwise.lab.models.initial import he_normal

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters (the paper's option A)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.new_channels = channels_out - channels_in

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block.

        Args:
            inputs: (batch, channels_in, height, width).

        Returns:
            (batch, channels_out, height / stride, width / stride).
        """
        shortcut = inputs
        if self.stride > 1 or self.new_channels > 0:
            shortcut = functional.pad(inputs[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        hidden = functional.relu(self.first_norm(self.first(inputs)))
        return functional.relu(self.second_norm(self.second(hidden)) + shortcut)


class ResNet(nn.Module):
    """Three stages of n blocks."""

    def __init__(self, blocks: int, channels_in: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels_in, WIDTHS[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(WIDTHS[0])
        stages: list[nn.Module] = []
        channels = WIDTHS[0]
        for width in WIDTHS:
            for _ in range(blocks):
                stages.append(Block(channels, width, stride=2 if channels != width else 1))
                channels = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, classes).
        """
        hidden = functional.relu(self.stem_norm(self.stem(images)))
        logits: Tensor = self.head(self.stages(hidden).mean(dim=(2, 3)))
        return logits


def resnet(blocks: int, channels: int, classes: int) -> nn.Module:
    """Build a residual network with the initialisation of He et al. (ICCV 2015).

    Args:
        blocks: blocks in each of the three stages; 1 gives ResNet-8, 3 gives ResNet-20.
        channels: channels of the images.
        classes: number of classes.

    Returns:
        The network.
    """
    network = ResNet(blocks, channels, classes)
    he_normal(network)
    return network
