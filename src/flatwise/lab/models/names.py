"""Names of networks: patterns with numbers in them, and what each builds."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from torch import nn

from flatwise.errors import UserError
from flatwise.lab.models.pyramidnet import pyramid_net
from flatwise.lab.models.resnet import resnet
from flatwise.lab.models.shakeshake import shake_shake_net
from flatwise.lab.models.small import cnn_plain, cnn_small, mlp
from flatwise.lab.models.vgg import vgg16
from flatwise.lab.models.wideresnet import wide_resnet, wide_resnet_without_norm

Shape = tuple[int, ...]
"""Channels, height and width of an image."""

Build = Callable[[Shape, int], nn.Module]
"""(shape of the images, classes) -> network."""

# The networks of `flatwise compare`.
COMPARED = ("mlp", "cnn-small", "cnn-plain", "resnet8", "resnet20")

OWN = (
    *COMPARED,
    "resnet32",
    "resnet44",
    "resnet56",
    "vgg16-bn",
    "wrn-16-4",
    "wrn-28-10",
    "wrn-40-2",
    "wrn-40-10-nobn",
    "shakeshake-26-2x32d",
    "shakeshake-26-2x96d",
    "pyramidnet-272-200",
    "pyramidnet-272-200-shakedrop",
)
"""Names to show; of the last four families the numbers can be others."""


def own_network(name: str) -> Build | None:
    """Find what builds one of the lab's own networks.

    Args:
        name: such as ``"wrn-28-10"``; the numbers may be any that the family has.

    Returns:
        The builder; None where the name is none of these.
    """
    if name in _FIXED:
        return _FIXED[name]
    for pattern, family in _FAMILIES:
        found = pattern.fullmatch(name)
        if found is not None:
            return family(name, *found.groups())
    return None


def _side(shape: Shape, name: str) -> int:
    if shape[1] != shape[2]:
        raise UserError(f"{name} needs square images, not {shape[1]}×{shape[2]}: crop them, or take a wrn or a resnet")
    return shape[1]


def _square(build: Callable[[int, int, int], nn.Module], name: str) -> Build:
    return lambda shape, classes: build(shape[0], _side(shape, name), classes)


def _blocks(name: str, depth: str, each: int, rest: int) -> int:
    """Return the blocks of a stage, or name the nearest depths that exist."""
    blocks, left = divmod(int(depth) - rest, each)
    if blocks >= 1 and left == 0:
        return blocks
    near = [each * n + rest for n in (max(blocks, 1), max(blocks, 1) + 1)]
    words = [name.replace(depth, str(n), 1) for n in near]
    raise UserError(f"there is no {name}: its depth must be {each}n + {rest}; did you mean {words[0]} or {words[1]}?")


def _width(name: str, number: str, least: int) -> int:
    if int(number) < least:
        raise UserError(f"there is no {name}: its width must be at least {least}")
    return int(number)


def _wide(name: str, depth: str, factor: str, plain: str | None) -> Build:
    blocks, k = _blocks(name, depth, 6, 4), _width(name, factor, 1)
    build = wide_resnet if plain is None else wide_resnet_without_norm
    return lambda shape, classes: build(blocks, k, shape[0], classes)


def _shake(name: str, depth: str, width: str) -> Build:
    blocks, channels = _blocks(name, depth, 6, 2), _width(name, width, 2)
    return lambda shape, classes: shake_shake_net(blocks, channels, shape[0], classes)


def _pyramid(name: str, depth: str, alpha: str, drop: str | None) -> Build:
    blocks, wider = _blocks(name, depth, 9, 2), int(alpha)
    return lambda shape, classes: pyramid_net(blocks, wider, shape[0], classes, shake_drop=drop is not None)


def _residual(blocks: int, shape: Shape, classes: int) -> nn.Module:
    return resnet(blocks, shape[0], classes)


_FIXED: dict[str, Build] = {
    "mlp": _square(mlp, "mlp"),
    "cnn-small": _square(cnn_small, "cnn-small"),
    "cnn-plain": _square(cnn_plain, "cnn-plain"),
    # 6n + 2 layers. (ResNet-50, -101 and -152 are the ImageNet networks of timm.)
    **{f"resnet{6 * blocks + 2}": partial(_residual, blocks) for blocks in (1, 3, 5, 7, 9)},
    "vgg16-bn": lambda shape, classes: vgg16(shape[0], min(shape[1:]), classes),
}

_FAMILIES: tuple[tuple[re.Pattern[str], Callable[..., Build]], ...] = (
    (re.compile(r"wrn-(\d+)-(\d+)(-nobn)?"), _wide),
    (re.compile(r"shakeshake-(\d+)-2x(\d+)d"), _shake),
    (re.compile(r"pyramidnet-(\d+)-(\d+)(-shakedrop)?"), _pyramid),
)
