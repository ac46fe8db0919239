"""The networks of the lab: its own, by name and numbers, and all of timm's."""

from __future__ import annotations

import torch
from torch import nn

from flatwise.errors import UserError
from flatwise.lab.models.from_timm import TIMM, timm_network
from flatwise.lab.models.names import COMPARED, OWN, Shape, own_network

__all__ = ["MODELS", "Shape", "build_model"]

MODELS = (*OWN, *TIMM)
"""Names to show. The numbers in some may be others, and any other name is looked up in timm."""


def build_model(
    name: str, shape: Shape, classes: int, seed: int, *, pretrained: bool = False, keep_head: bool = False
) -> nn.Module:
    """Build a network whose initial weights the seed alone decides.

    Args:
        name: one of ``MODELS``, the same with other numbers (``wrn-D-K``, ``wrn-D-K-nobn``, ``shakeshake-D-2xWd``,
            ``pyramidnet-D-A``, ``pyramidnet-D-A-shakedrop``), or any name of timm.
        shape: channels, height and width of the images, in pixels.
        classes: number of classes.
        seed: decides the weights; the global random state stays as it was.
        pretrained: begin with timm's pretrained weights, with a new last layer.
        keep_head: keep the pretrained last layer too.

    Returns:
        The network, in training mode.

    Raises:
        UserError: the lab has no such network; or pretrained weights are asked for that there are none of.
    """
    if keep_head and not pretrained:
        raise UserError("--keep-head keeps a pretrained last layer: add --pretrained")
    build = own_network(name)
    if build is not None and pretrained:
        raise UserError(f"there are no pretrained weights of {name}, only of timm's networks: leave out --pretrained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if build is None:
            return timm_network(name, shape, classes, pretrained=pretrained, keep_head=keep_head)
        network = build(shape, classes)
    # In this order of memory a CPU takes two thirds of the time for cnn-small on 28×28 pixels. On 8×8 little is won.
    # The other networks are left to the training's own setting.
    faster = name in COMPARED and shape[1] > 16
    return network.to(memory_format=torch.channels_last) if faster else network
