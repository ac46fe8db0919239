"""VGG-16 (Simonyan & Zisserman, ICLR 2015, column D) with batch normalisation, for images of CIFAR's size.

Thirteen 3×3 convolutions, and one linear layer where the original has three: after five halvings an image of 32 pixels
is one pixel of 512 channels. Smaller images are halved as long as they have more than a pixel.
"""

from __future__ import annotations

from torch import nn

from flatwise.lab.models.initial import authors_head, he_normal

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vgg16(channels: int, side: int, classes: int) -> nn.Module:
    """Build a VGG-16 with batch normalisation, He's initialisation and the authors' last layer.

    Args:
        channels: channels of the images.
        side: the shorter side of the images, in pixels.
        classes: number of classes.

    Returns:
        The network.
    """
    layers: list[nn.Module] = []
    for width, convolutions in STAGES:
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        if side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    head = nn.Linear(channels, classes)
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    he_normal(network)
    authors_head(head)
    return network
