"""Networks small enough to train many times on a CPU: one without and two with convolutions."""

from __future__ import annotations

from torch import nn


def mlp(channels: int, side: int, classes: int) -> nn.Module:
    """Build a perceptron with two hidden layers: 128 wide for images of up to 16 pixels, 256 for larger.

    Args:
        channels: channels of the images.
        side: height and width of the images.
        classes: number of classes.

    Returns:
        The network.
    """
    width = 128 if side <= 16 else 256
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * side * side, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def cnn_small(channels: int, side: int, classes: int) -> nn.Module:
    """Build two convolutions and two linear layers, with batch normalisation after each but the last.

    Images of more than 16 pixels are pooled once more, so that the linear part stays the same order of size.
    The normalisation makes the network indifferent to the scale of its weights; without it, a small network
    collapses to a constant output at the radii that help against label noise.

    Args:
        channels: channels of the images.
        side: height and width of the images.
        classes: number of classes.

    Returns:
        The network.
    """
    width, hidden = 16, 128
    pools, left = _pools(side)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        *([nn.MaxPool2d(2)] if pools == 2 else []),
        nn.Flatten(),
        nn.Linear(2 * width * left * left, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def cnn_plain(channels: int, side: int, classes: int) -> nn.Module:
    """Build two convolutions and two linear layers without normalisation, for looking at the Hessian.

    Normalisation makes a layer indifferent to the scale of its weights, so that the eigenvalues of the Hessian change
    with that scale and nothing else; the spectra of Foret et al. (section 4.2) are of a network without it too.

    Args:
        channels: channels of the images.
        side: height and width of the images.
        classes: number of classes.

    Returns:
        The network.
    """
    width, hidden = 8, 32
    pools, left = _pools(side)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        *([nn.MaxPool2d(2)] if pools == 2 else []),
        nn.Flatten(),
        nn.Linear(2 * width * left * left, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def _pools(side: int) -> tuple[int, int]:
    """Say how often images are halved, and what side is left."""
    pools = 1 if side <= 16 else 2
    return pools, side // 2**pools
