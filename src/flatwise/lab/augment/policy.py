"""AutoAugment (Cubuk et al. 2019) and RandAugment (Cubuk et al. 2020), each image with an operation of its own.

What each image gets is drawn first. Then the images that got the same operation with the same strength go through
torchvision's kernel together, which is what makes a batch cheap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from flatwise.lab.augment.keys import below, uniform
from flatwise.lab.augment.operations import Operation, operation, perform
from flatwise.lab.augment.policies import POLICIES

# The numbers of the draws; basic.py has those below 16.
SUB_POLICY = 16
FIRST_STEP = 17  # whether, sign
RANDAUGMENT = 24  # operation, sign, of each of the steps

LEVELS = 10  # of AutoAugment: 0 to 9
RAND_LEVELS = 11  # of RandAugment: 0 to 10
RAND_STEPS, RAND_LEVEL = 2, 9
# The fourteen of the paper of RandAugment.
RAND_OPERATIONS = (
    "Identity", "AutoContrast", "Equalize", "Rotate", "Solarize", "Color", "Posterize", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
WITHOUT_STRENGTH = frozenset(("AutoContrast", "Equalize", "Invert"))

# What one image gets in one step; None leaves it as it is.
Plan = list[Operation | None]


def autoaugment_plans(keys: Tensor, policy: str, height: int, width: int) -> list[Plan]:
    """Draw a sub-policy for each image, and whether each of its two steps is done.

    Args:
        keys: int64, (batch,), on the CPU.
        policy: "cifar", "svhn" or "imagenet".
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        For each of the two steps, what each image gets.
    """
    table = POLICIES[policy]
    chosen = below(keys, SUB_POLICY, len(table)).tolist()
    plans: list[Plan] = []
    for step in range(2):
        chances, signs = uniform(keys, FIRST_STEP + 2 * step, FIRST_STEP + 2 * step + 1).tolist()
        plan: Plan = []
        for number, chance, sign in zip(chosen, chances, signs, strict=True):
            name, probability, level = table[number][step]
            done = chance < probability
            plan.append(operation(name, level, LEVELS, height, width, sign < 0.5) if done else None)
        plans.append(plan)
    return plans


def randaugment_plans(keys: Tensor, height: int, width: int) -> list[Plan]:
    """Draw two of the fourteen operations for each image, with repetition, all at level 9 of 10.

    Args:
        keys: int64, (batch,), on the CPU.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        For each of the two steps, what each image gets.
    """
    plans: list[Plan] = []
    for step in range(RAND_STEPS):
        chosen = below(keys, RANDAUGMENT + 2 * step, len(RAND_OPERATIONS)).tolist()
        signs = below(keys, RANDAUGMENT + 2 * step + 1, 2).tolist()
        plan: Plan = []
        for number, sign in zip(chosen, signs, strict=True):
            name = RAND_OPERATIONS[number]
            level = None if name in WITHOUT_STRENGTH else RAND_LEVEL
            identity = name == "Identity"
            plan.append(None if identity else operation(name, level, RAND_LEVELS, height, width, sign == 0))
        plans.append(plan)
    return plans


def follow(images: Tensor, plans: list[Plan], do: Callable[[Tensor, Operation], Tensor] = perform) -> Tensor:
    """Do to each image what was drawn for it.

    Args:
        images: uint8, (batch, 1 or 3 channels, height, width); they stay as they are.
        plans: for each step, what each image gets.
        do: performs one operation on some images.

    Returns:
        uint8, the same shape.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    for plan in plans:
        members: defaultdict[Operation, list[int]] = defaultdict(list)
        for place, one in enumerate(plan):
            if one is not None:
                members[one].append(place)
        for one, places in members.items():
            index = torch.tensor(places).to(images.device, non_blocking=True)
            images.index_copy_(0, index, do(images.index_select(0, index), one))
    return images
