"""WideResNet-d-k (Zagoruyko & Komodakis, BMVC 2016): three stages of (d - 4) / 6 blocks, 16k-32k-64k channels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from flatwise.lab.models.initial import authors_head, he_normal


class Block(nn.Module):
    """Two times normalisation, ReLU and 3×3 convolution, beside the identity.

    Where the channels change, the shortcut is a 1×1 convolution of the normalised input, as in the code of the paper.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(channels_in)
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if channels_in != channels_out else None
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block.

        Args:
            inputs: (batch, channels_in, height, width).

        Returns:
            (batch, channels_out, height / stride, width / stride).
        """
        active = functional.relu(self.first_norm(inputs))
        hidden: Tensor = self.second(functional.relu(self.second_norm(self.first(active))))
        shortcut: Tensor = inputs if self.shortcut is None else self.shortcut(active)
        return hidden + shortcut


class PlainBlock(nn.Module):
    """The block without normalisation: convolutions with biases, and one factor for the branch."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.factor = nn.Parameter(self.first.weight.new_ones(1))
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride) if channels_in != channels_out else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block.

        Args:
            inputs: (batch, channels_in, height, width).

        Returns:
            (batch, channels_out, height / stride, width / stride).
        """
        active = functional.relu(inputs)
        hidden: Tensor = self.factor * self.second(functional.relu(self.first(active)))
        shortcut: Tensor = inputs if self.shortcut is None else self.shortcut(active)
        return hidden + shortcut


class WideResNet(nn.Module):
    """A convolution of 16 channels, three stages, and a linear layer on the mean over the image.

    Args:
        blocks: blocks in each stage.
        factor: k.
        channels: channels of the images.
        classes: number of classes.
        normalised: whether there is batch normalisation.
    """

    def __init__(self, blocks: int, factor: int, channels: int, classes: int, *, normalised: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=not normalised)
        stages: list[nn.Module] = []
        width = 16
        for stage, wider in enumerate((16 * factor, 32 * factor, 64 * factor)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append((Block if normalised else PlainBlock)(width, wider, stride))
                width = wider
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(width) if normalised else nn.Identity()
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, classes).
        """
        hidden = functional.relu(self.norm(self.stages(self.stem(images))))
        logits: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return logits


def wide_resnet(blocks: int, factor: int, channels: int, classes: int) -> nn.Module:
    """Build a WideResNet, with He's initialisation and the authors' last layer.

    Args:
        blocks: blocks in each stage, (d - 4) / 6.
        factor: k, by which the layers are wider than those of a ResNet.
        channels: channels of the images.
        classes: number of classes.

    Returns:
        The network.
    """
    network = WideResNet(blocks, factor, channels, classes, normalised=True)
    he_normal(network)
    authors_head(network.head)
    return network


def wide_resnet_without_norm(blocks: int, factor: int, channels: int, classes: int) -> nn.Module:
    """Build a WideResNet without any normalisation, as for the spectra of Foret et al. (section 4.2).

    The paper does not say how that network began. Here it is Fixup (Zhang, Dauphin, Ma, ICLR 2019): with L branches,
    the first convolution of each is He's times ``L^(-1/2)`` and the second is 0, so that every branch begins as 0 and
    the output changes as much in a step whatever the depth; the last layer is 0; each branch has a learnt factor,
    1 at first. Biases are those of the convolutions, one for each channel. He's variance is that by the fan-in, which
    keeps the size of activations where nothing normalises them: by the fan-out, each widening would shrink them.

    Args:
        blocks: blocks in each stage, (d - 4) / 6.
        factor: k.
        channels: channels of the images.
        classes: number of classes.

    Returns:
        The network.
    """
    network = WideResNet(blocks, factor, channels, classes, normalised=False)
    he_normal(network, fan="fan_in")
    branches = [module for module in network.modules() if isinstance(module, PlainBlock)]
    for branch in branches:
        branch.first.weight.data.mul_(len(branches) ** -0.5)
        nn.init.zeros_(branch.second.weight)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    return network
