"""The networks of the lab, each sized to its data set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from flatwise.errors import UnknownNameError
from flatwise.lab.models.resnet import resnet
from flatwise.lab.models.small import cnn_plain, cnn_small, mlp

# name -> (side of the square image, classes) -> network
MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": mlp,
    "cnn-small": cnn_small,
    "cnn-plain": cnn_plain,
    "resnet8": lambda side, classes: resnet(1, classes),
    "resnet20": lambda side, classes: resnet(3, classes),
}


def build_model(name: str, side: int, classes: int, seed: int) -> nn.Module:
    """Build a network whose initial weights the seed alone decides.

    Args:
        name: one of ``MODELS``.
        side: height and width of the images, in pixels.
        classes: number of classes.
        seed: decides the weights; the global random state stays as it was.

    Returns:
        The network, in training mode.

    Raises:
        UnknownNameError: no such model.
    """
    if name not in MODELS:
        raise UnknownNameError("model", name, MODELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](side, classes)
    # In this order of memory a CPU takes two thirds of the time for cnn-small on 28×28 pixels. On 8×8 little is won.
    return model.to(memory_format=torch.channels_last) if side > 16 else model
