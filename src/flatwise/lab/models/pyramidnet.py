"""PyramidNet (Han, Kim, Kim, CVPR 2017) with bottlenecks: channels grow a little in every block, by alpha in all.

Block k of N has ``floor(16 + k alpha / N)`` channels inside and four times as many outside (eq. 2, kept as a fraction
from block to block). The SAM authors' code rounds instead, which makes the network 0.2 M larger than the published
26.0 M. With ShakeDrop (Yamada et al., 2018) each branch is scaled at random.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from flatwise.lab.models.initial import authors_head, he_normal
from flatwise.lab.models.shake import ShakeDrop, survival

EXPANSION = 4


class Block(nn.Module):
    """Convolutions 1×1, 3×3, 1×1 between normalisations, beside a shortcut without parameters.

    There is no ReLU before the first convolution and none after the sum (Han et al., section 2.3, figure 6 d).
    """

    def __init__(self, channels_in: int, channels: int, stride: int, mix: nn.Module) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(channels_in)
        self.first = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.third_norm = nn.BatchNorm2d(channels)
        self.third = nn.Conv2d(channels, EXPANSION * channels, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(EXPANSION * channels)
        self.mix = mix
        self.stride = stride
        self.new_channels = EXPANSION * channels - channels_in

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block.

        Args:
            inputs: (batch, channels_in, height, width).

        Returns:
            (batch, 4 channels, height / stride, width / stride).
        """
        hidden: Tensor = self.first(self.first_norm(inputs))
        hidden = self.second(functional.relu(self.second_norm(hidden)))
        hidden = self.mix(self.last_norm(self.third(functional.relu(self.third_norm(hidden)))))
        shortcut = inputs if self.stride == 1 else functional.avg_pool2d(inputs, self.stride, ceil_mode=True)
        # The new channels of the shortcut are 0.
        return functional.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels)) + hidden


class PyramidNet(nn.Module):
    """A convolution of 16 channels, three stages, and a linear layer on the mean over the image.

    Args:
        blocks: blocks in each stage.
        alpha: by how many channels the network grows from its first layer to its last.
        channels: channels of the images.
        classes: number of classes.
        shake_drop: scale the branches at random.
    """

    def __init__(self, blocks: int, alpha: int, channels: int, classes: int, *, shake_drop: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        stages: list[nn.Module] = []
        before, total = 16, 3 * blocks
        for number in range(1, total + 1):
            mix = ShakeDrop(survival(number, total)) if shake_drop else nn.Identity()
            inside = 16 + number * alpha // total
            stages.append(Block(before, inside, stride=2 if number in (blocks + 1, 2 * blocks + 1) else 1, mix=mix))
            before = EXPANSION * inside
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(before)
        self.head = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, classes).
        """
        hidden = functional.relu(self.norm(self.stages(self.stem_norm(self.stem(images)))))
        logits: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return logits


def pyramid_net(blocks: int, alpha: int, channels: int, classes: int, *, shake_drop: bool = False) -> nn.Module:
    """Build a PyramidNet, with He's initialisation and the authors' last layer.

    Args:
        blocks: blocks in each stage, (depth - 2) / 9.
        alpha: the widening.
        channels: channels of the images.
        classes: number of classes.
        shake_drop: whether branches are scaled at random.

    Returns:
        The network.
    """
    network = PyramidNet(blocks, alpha, channels, classes, shake_drop=shake_drop)
    he_normal(network)
    authors_head(network.head)
    return network
