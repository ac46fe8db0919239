"""What the checks over the whole registry share: how to make a method by its name alone, and how to step with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tests.core_cases import batch
from torch import Tensor, nn
from torch.nn import functional as F

from flatwise import create, list_variants, variant_info
from flatwise.directions import Momentum

STEPS = 12

MODEL = object()
NEEDED = {
    "p": 1.5,
    "model": MODEL,
    "total_steps": STEPS,
    "warmup_steps": 3,
    "micro_batch_size": 6,  # parts of 6, 6 and 4 samples
    "train_size": 64,
}
"""A value for every option that a row asks for."""

SHORT: dict[str, dict[str, Any]] = {"ae-sam": {"delta": 0.5}}
"""Options with which a method does in 12 steps what its defaults do in a training: here, to leave steps out."""

NAMES = list_variants()
WRAPPED = [name for name in NAMES if variant_info(name).own is None]

BASES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "plain": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
}


def options_of(name: str, model: nn.Module) -> dict[str, Any]:
    """Options that a row has no default for."""
    missing = [option for option in variant_info(name).needs if option not in NEEDED]
    if missing:
        pytest.fail(f"the row {name!r} needs {', '.join(missing)}: add a value to NEEDED in tests/family_cases.py")
    return {option: model if NEEDED[option] is MODEL else NEEDED[option] for option in variant_info(name).needs}


def make(name: str, model: nn.Module, base: str = "momentum", **options: Any) -> Any:
    """The method with its defaults around a base optimizer."""
    return create(name, BASES[base](model), **{**options_of(name, model), **SHORT.get(name, {}), **options})


def bases_of(name: str) -> list[str]:
    """Bases that the method allows; one that is an optimizer itself takes nothing but the parameters from them."""
    row = variant_info(name)
    if row.own is not None:
        return ["momentum"]
    return ["momentum", "adamw"] if row.direction is Momentum else list(BASES)


NAMES_AND_BASES = [(name, base) for name in NAMES for base in bases_of(name)]


def parts_of(name: str) -> int:
    """Micro-batches of a batch of 16."""
    return 3 if "micro_batch_size" in variant_info(name).needs else 1


def ranks(name: str) -> bool:
    """Whether the loss function returns a loss for each sample."""
    return not variant_info(name).options.keys().isdisjoint({"top_fraction", "rising_fraction"})


def splits(name: str) -> bool:
    """Whether flatwise must see the batch."""
    return ranks(name) or parts_of(name) > 1 or "ascent_fraction" in variant_info(name).options


def loss_of(name: str, model: nn.Module, factor: float = 1.0) -> Callable[[Any], Tensor]:
    """The loss function that the method wants."""
    reduction = "none" if ranks(name) else "mean"
    return lambda part: F.cross_entropy(model(part[0]).float(), part[1], reduction=reduction) * factor


def train(
    name: str, model: nn.Module, opt: Any, steps: Iterable[int] = range(4), lr: float | None = None
) -> list[tuple[Tensor, str]]:
    """Take steps, each on its own batch, with a learning rate that falls from ``lr``; the losses and the reasons."""
    seen = []
    dtype = next(model.parameters()).dtype
    for step in steps:
        if lr is not None:
            for group in opt.param_groups:
                group["lr"] = lr * (1 - step / (2 * STEPS))
        x, y = batch(step)
        loss = opt.step(loss_of(name, model), (x.to(dtype), y))
        seen.append((loss.detach(), opt.last.reason))
    return seen
