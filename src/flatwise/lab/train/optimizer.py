"""The base optimizer with its groups, and the method around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import flatwise
from flatwise.errors import UserError
from flatwise.lab.methods import Method, default_rho, parse_method, split_methods, wrap
from flatwise.lab.train.config import TrainConfig

RMS_ALPHA, RMS_EPSILON = 0.9, 1e-3
"""Of rmsprop, as EfficientNet is trained (Tan and Le, ICML 2019, and their code)."""


def decayed(config: TrainConfig, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Choose the parameters that decay.

    Args:
        config: its ``decay`` is read.
        parameters: all of them.

    Returns:
        All, or those with more than one dimension: neither biases nor the scales of normalisation layers.
    """
    return [weight for weight in parameters if config.decay == "all" or weight.dim() > 1]


def base_optimizer(config: TrainConfig, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Build the optimizer that the method wraps.

    Args:
        config: names it and its settings.
        parameters: what it steps.

    Returns:
        The optimizer; its weight decay is 0 where that is in the loss.
    """
    decay = 0.0 if config.decay_in_loss else config.weight_decay
    chosen = {id(weight) for weight in decayed(config, parameters)}
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in parameters if (id(weight) in chosen) == wanted], "weight_decay": part}
        for wanted, part in ((True, decay), (False, 0.0))
    ]
    # The peak, which warm-up does not begin with: methods that tie their radius to the rate ask for it.
    groups = [{**group, "initial_lr": config.lr} for group in groups if group["params"]]
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, momentum=config.momentum, alpha=RMS_ALPHA, eps=RMS_EPSILON)
    return torch.optim.AdamW(groups, lr=config.lr)


def parse_train_method(config: TrainConfig) -> Method:
    """Read the method and check it against the core.

    Args:
        config: its ``method``, ``rho``, ``m`` and ``optimizer`` are read.

    Returns:
        The method with all its options, ``micro_batch_size`` among them where ``m`` is set.

    Raises:
        UserError: no method or several, or m given twice or to the base optimizer.
    """
    texts = split_methods(config.method)
    if len(texts) != 1:
        raise UserError(f"--method names one method, not {config.method!r}; flatwise compare takes several")

    def rho(variant: str) -> float | str:
        return default_rho(variant) if config.rho is None else config.rho

    method = parse_method(texts[0], config.optimizer, rho, lambda weights: base_optimizer(config, weights))
    if config.m is None:
        return method
    if method.variant is None:
        raise UserError(f"--m divides the batch for a perturbation, and --method {config.method} has none")
    if "micro_batch_size" in method.options:
        raise UserError(f"m is given twice, in --method {config.method} and as --m {config.m}: leave one of them out")
    return replace(method, options={**method.options, "micro_batch_size": config.m})


def build_optimizer(
    config: TrainConfig,
    method: Method,
    model: nn.Module,
    *,
    total_steps: int,
    train_size: int,
    batch_size: int,
    sync_ascent: bool | None = None,
    scaler: Any = None,
) -> Any:
    """Build the base optimizer and the method around it.

    Args:
        config: the settings.
        method: what wraps the base.
        model: what is trained, as it is called in a pass.
        total_steps: steps of the whole training.
        train_size: number of training samples.
        batch_size: samples that a process has in a step.
        sync_ascent: whether processes share a perturbation; None in a single process.
        scaler: scales the loss, or None.

    Returns:
        The core's optimizer. The base alone is SAM with radius 0, which is the base's own step bit for bit.

    Raises:
        UserError: the method cannot do what the settings ask for.
    """
    base = base_optimizer(config, [weight for weight in model.parameters() if weight.requires_grad])
    more: dict[str, Any] = {"model": model}
    if scaler is not None:
        more["grad_scaler"] = scaler
    if config.clip:
        more["max_grad_norm"] = config.clip
    if sync_ascent is not None:
        more["sync_ascent"] = sync_ascent
    try:
        if method.variant is None:
            return flatwise.SAM(base, 0.0, **{**more, "sync_ascent": None})
        return wrap(method, base, total_steps, model=model, train_size=train_size, batch_size=batch_size, more=more)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        reason = reason.replace("Use sync_ascent=True", "Use --perturbation global")
        raise UserError(f"method {method.name!r}: {reason}") from error
