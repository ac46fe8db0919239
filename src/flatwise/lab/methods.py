"""From ``sgd,sam:rho=0.5:m=32`` to what is trained: a name, a variant of the core and its options."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import flatwise
from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.config import CompareConfig

BASES = frozenset({"sgd", "adamw", "rmsprop"})
ALIASES = {"m": "micro_batch_size"}
NUMBERS = {"inf": math.inf, "true": True, "false": False}
"""Words that are values, as in lp:p=inf, beside what Python can read."""
WARM_UP = 0.05
"""Share of the training in which ``warmup-off`` does not perturb."""
# Radii for the default network on the default data, where nothing else is said. They were chosen by validation
# accuracy, on seeds that no default comparison uses (docs/compare.md). Elsewhere each variant's own default holds.
DEFAULT_NETWORK_RHO = {"sam": 0.5, "asam": 5.0}


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: as the user wrote it; the key in ``results.json``.
        variant: the core's name of the method; None is the base optimizer alone.
        options: what the variant is created with.
        longer: how many times the configured epochs it trains.
    """

    name: str
    variant: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    longer: int = 1


def parse_methods(config: CompareConfig) -> list[Method]:
    """Read the list of methods and check each against the core.

    Args:
        config: its ``methods``, ``rho``, ``optimizer`` and ``dataset`` are read.

    Returns:
        The methods, in the order given.

    Raises:
        UserError: an unknown method or option, a bad value, or the same method twice.
    """

    def base(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return base_optimizer(config, parameters)

    def rho(variant: str) -> float | str:
        return _default_rho(variant, config)

    methods = [parse_method(text, config.optimizer, rho, base) for text in split_methods(config.methods)]
    names = [method.name for method in methods]
    if not names:
        raise UserError("--methods names no method; for example --methods sgd,sam")
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"the method {name!r} is listed twice; options tell two apart, as in sam:rho=0.1,sam:rho=0.5"
            )
    if config.equal_compute and config.optimizer not in names:
        raise UserError(f"--equal-compute doubles the epochs of the base: add {config.optimizer} to --methods")
    return methods


def trained_methods(config: CompareConfig) -> list[Method]:
    """List what is trained: the methods, and with ``equal_compute`` the base for twice the epochs.

    Args:
        config: the settings.

    Returns:
        The methods in the order given, the longer base last.
    """
    methods = parse_methods(config)
    if config.equal_compute:
        methods.append(Method(f"{config.optimizer}-2x-epochs", None, longer=2))
    return methods


def parse_method(
    text: str,
    optimizer: str,
    rho: Callable[[str], float | str],
    base: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> Method:
    """Read one method and check it against the core.

    Args:
        text: a name with options, such as ``"sam:rho=0.5:m=32"``.
        optimizer: the base optimizer's name.
        rho: the radius of a variant that states none.
        base: builds the base optimizer around parameters.

    Returns:
        The method.

    Raises:
        UserError: a bad option or value, or another base optimizer's name.
        UnknownNameError: no such method.
    """
    variant, *assignments = _split(text, ":")
    if variant in {optimizer, "base"}:
        if assignments:
            raise UserError(f"{variant} is the base optimizer; its settings are flags (--lr), not {assignments[0]!r}")
        return Method(optimizer, None)
    if variant in BASES:
        raise UserError(
            f"the base optimizer here is {optimizer}: write {optimizer} or base, or set --optimizer {variant}"
        )
    known = list(flatwise.list_variants())
    if variant not in known:
        raise UnknownNameError("method", variant, [optimizer, *known])
    options = dict(_assignment(part, text) for part in assignments)
    options.setdefault("rho", rho(variant))
    method = Method(text, variant, options)
    _check(method, base)
    return method


def _default_rho(variant: str, config: CompareConfig) -> float | str:
    if config.rho is not None:
        return config.rho
    if (config.dataset, config.model) == ("digits", "cnn-small") and variant in DEFAULT_NETWORK_RHO:
        return DEFAULT_NETWORK_RHO[variant]
    return default_rho(variant)


def default_rho(variant: str) -> float | str:
    """Return the radius of a method where nothing else is said.

    Args:
        variant: the core's name of the method.

    Returns:
        The radius, or ``"auto"`` where it sets itself.
    """
    row = flatwise.variant_info(variant)
    auto: float | str = row.options.get("rho", row.rho)
    return auto


def _assignment(part: str, text: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise UserError(f"in {text!r}, {part!r} is no option; options look like rho=0.5")
    name = ALIASES.get(name, name)
    if value in NUMBERS:
        return name, NUMBERS[value]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _check(method: Method, base: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
    # The core knows its options best: it builds the method around a few weights, and its refusal is shown.
    with torch.random.fork_rng(devices=()):
        model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.LayerNorm(1))
    try:
        wrap(method, base(list(model.parameters())), total_steps=100, model=model)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"method {method.name!r}: {reason}") from error


def wrap(
    method: Method,
    base: torch.optim.Optimizer,
    total_steps: int,
    *,
    model: torch.nn.Module | None = None,
    train_size: int = 1,
    batch_size: int = 4,
    more: Mapping[str, Any] | None = None,
) -> Any:
    """Build a method's optimizer around a base optimizer, with what only the lab knows.

    Args:
        method: a method that has a variant.
        base: the optimizer to wrap.
        total_steps: steps of the whole training.
        model: what is trained.
        train_size: number of training samples.
        batch_size: samples in a step.
        more: options that do not come from the method's text.

    Returns:
        The core's optimizer.
    """
    assert method.variant is not None
    row = flatwise.variant_info(method.variant)
    known = {
        "p": math.inf,
        "model": model,
        "train_size": train_size,
        "micro_batch_size": max(1, batch_size // 4),
        "warmup_steps": math.ceil(WARM_UP * total_steps),
    }
    given = {option: known[option] for option in row.needs if option in known}
    if row.own is None:
        given["total_steps"] = total_steps  # whether or not the method looks at it
        if {"only", "scaled"} & set(method.options):
            given["model"] = model
    return flatwise.create(method.variant, base, **{**given, **(more or {}), **method.options})


def split_methods(methods: str) -> list[str]:
    """Cut a list of methods at its commas.

    Args:
        methods: such as ``"sgd,gsam:alpha=0.4,rho_min=0.1"``.

    Returns:
        The text of each, such as ``"gsam:alpha=0.4:rho_min=0.1"``.
    """
    # A comma may stand before an option too, as in gsam:alpha=0.4,rho_min=0.1: no method's name has an equals sign.
    texts: list[str] = []
    for text in (part.strip() for part in _split(methods, ",")):
        if not text:  # a comma too many
            continue
        if texts and "=" in text.partition(":")[0]:
            texts[-1] += f":{text}"
        else:
            texts.append(text)
    return texts


def _split(text: str, separator: str) -> list[str]:
    # A separator inside brackets belongs to the value: sam:window=(0.5,1.0).
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def base_optimizer(config: CompareConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Build the optimizer that all methods share.

    Args:
        config: names it and its settings.
        parameters: what it steps.

    Returns:
        SGD with momentum, or AdamW.
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
