"""Reading the arguments of :class:`flatwise.SAM`: one clear error for each mistake."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatwise.ascent import GradientAscent
from flatwise.batching import Batching
from flatwise.descent import Descent
from flatwise.joint import Joint
from flatwise.schedule import Schedule
from flatwise.shards import shardings_of

OPTIONS = (
    "rho", "p", "adaptive", "eta", "ascent_steps", "second_order", "ascent", "descent", "schedule", "batching",
    "micro_batch_size", "ascent_fraction", "every", "window", "total_steps", "model", "fresh_masks", "grad_scaler",
    "max_grad_norm", "sync_ascent",
)  # fmt: skip


def checked_radius(rho: Any) -> float:
    """Return a radius as a number.

    Args:
        rho: what the user gave, or what a schedule returned.

    Returns:
        The radius.

    Raises:
        ValueError: if it is negative or not finite.
        TypeError: if it is not a number.
    """
    try:
        number = float(rho)
    except (TypeError, ValueError):
        raise TypeError(f"rho must be a number, or a function of the step that returns one, got {rho!r}") from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
    return number


def check_fit(ascent: GradientAscent, descent: Descent, schedule: Schedule, batching: Batching) -> None:
    """Refuse slots that make no sense together, by name.

    Args:
        ascent: where to look.
        descent: what to step with.
        schedule: when.
        batching: on which samples.

    Raises:
        ValueError: if two of them do not fit.
    """
    direction, name = type(ascent.direction).__name__, type(descent).__name__
    one_pass, m = not ascent.direction.uses_gradient, batching.micro_batch_size
    clean = descent.needs_clean or descent.needs_output
    part = batching.ascent_fraction < 1 or batching.rising_fraction < 1
    refused = {
        "second_order=True is defined for one ascent step: leave ascent_steps at 1": (
            descent.adds_term and ascent.steps > 1
        ),
        f"second_order=True differentiates the perturbation along the gradient, and direction={direction} climbs along "
        "something else": descent.adds_term and direction != "Gradient",
        "second_order=True needs both passes on the same samples: leave rising_fraction at 1": (
            descent.adds_term and batching.rising_fraction < 1
        ),
        f"{name} uses the gradient at w, which direction={direction} does not compute": clean and one_pass,
        f"{name} joins two gradients of the same samples: leave ascent_fraction and rising_fraction at 1": clean
        and part,
        f"{name} keeps one part for the whole batch: leave micro_batch_size out": descent.reuses and m is not None,
        f"a decoupled {name} acts once on the whole batch: leave micro_batch_size out, or use decoupled=False": (
            descent.adds_late and m is not None
        ),
        f"{type(schedule).__name__} decides by the gradient at w, which direction={direction} does not compute": (
            schedule.needs_norm and one_pass
        ),
        f"{type(schedule).__name__} decides once for the whole batch: leave micro_batch_size out": (
            schedule.needs_norm and m is not None
        ),
        f"direction={direction} has one pass, which sees the whole batch: leave ascent_fraction, top_fraction and "
        "rising_fraction at 1": one_pass and (part or batching.top_fraction < 1),
    }
    for text, wrong in refused.items():
        if wrong:
            raise ValueError(text)


def check_sync(sync: Any, ascent: GradientAscent, descent: Descent, schedule: Schedule) -> None:
    """Refuse what cannot work where ranks climb along gradients of their own.

    Args:
        sync: the option ``sync_ascent``.
        ascent: where to look.
        descent: what to step with.
        schedule: when.

    Raises:
        TypeError: if ``sync`` is no choice.
        ValueError: if a slot does not fit it.
    """
    if sync is None or sync is True:
        return
    if not isinstance(sync, int) or sync < 0:
        raise TypeError(f"sync_ascent must be True, False or a number of ranks, got {sync!r}")
    name = f"sync_ascent={sync!r}"
    refused = {
        f"{type(descent).__name__} joins the gradient at w, which {name} keeps apart on every rank, with one that is "
        "summed: ranks would part. Use sync_ascent=True": descent.needs_clean or descent.adds_term,
        f"{type(schedule).__name__} decides by the gradient at w, which {name} keeps apart on every rank: ranks would "
        "decide differently. Use sync_ascent=True": schedule.needs_norm,
        f"direction={type(ascent.direction).__name__} remembers the gradient at w, which {name} keeps apart on every "
        "rank, and a checkpoint holds that of one. Use sync_ascent=True": ascent.direction.whole,
    }
    for text, wrong in refused.items():
        if wrong:
            raise ValueError(text)


def check_sharded(params: Iterable[Tensor], ascent: GradientAscent, descent: Descent, sync: Any) -> None:
    """Refuse what cannot be done with parameters of which a process holds a part.

    Args:
        params: all parameters.
        ascent: where to look.
        descent: what to step with.
        sync: the option ``sync_ascent``.

    Raises:
        ValueError: if some are cut and the method needs them whole.
    """
    over = [sharding for sharding in shardings_of(params) if sharding is not None]
    if not over:
        return
    by_filter = ascent.ball.adaptive == "filter" or getattr(ascent.direction, "filter_scaled", False)
    refused = {
        "second_order=True differentiates gradients, which fully_shard and tensor parallelism do not allow: leave it "
        "out, or train with DistributedDataParallel": descent.adds_term,
        "ranks that share the parts of one model share its perturbation: sync_ascent must be True with fully_shard or "
        "tensor parallelism": sync is not None and sync is not True,
        "rounding='stochastic' would round replicas of a weight differently: leave it out with fully_shard or tensor "
        "parallelism, and keep the weights in float32 with a MixedPrecisionPolicy": ascent.rounding == "stochastic",
        "the scaling by filters needs whole rows of a weight in one place, and some weights are cut along another "
        "dimension than the first: shard along dimension 0, or use a method without filters": (
            by_filter and not all(sharding.by_rows for sharding in over)
        ),
    }
    for text, wrong in refused.items():
        if wrong:
            raise ValueError(text)


def _unknown_options(names: Iterable[str]) -> str:
    """Return the text of the error for keywords that nobody knows, with the nearest known one."""
    parts = []
    for name in names:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        parts.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return f"SAM got unknown options: {', '.join(parts)}. Known: {', '.join(OPTIONS)}"


def make_base(params_or_base: Any, factory: Any, arguments: dict[str, Any]) -> Optimizer:
    """Return the base optimizer from either form of construction.

    Args:
        params_or_base: a ready optimizer, a list of them, or parameters.
        factory: None, or the class (or any callable) that makes the optimizer from parameters.
        arguments: keywords for the factory.

    Returns:
        The base optimizer.

    Raises:
        TypeError: if the arguments are of the wrong kind.
        ValueError: if the optimizer cannot be a base.
    """
    engine = {cls.__module__ for cls in type(params_or_base).__mro__}
    if any(name.startswith(("deepspeed.runtime", "accelerate.utils.deepspeed")) for name in engine):
        raise TypeError(
            "SAM cannot wrap an optimizer of the DeepSpeed engine, which owns and partitions weights and gradients: "
            "use FSDP2 (fully sharded) or DDP instead, around a plain optimizer"
        )
    several = list(params_or_base) if isinstance(params_or_base, list | tuple) else []
    if several and all(isinstance(base, Optimizer) for base in several):
        for base in several:
            _check_base(base)
        params_or_base = Joint(several)
    if isinstance(params_or_base, Optimizer):
        if not hasattr(params_or_base, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"the base optimizer is a framework's wrapper ({type(params_or_base).__name__}): wrap the plain "
                "optimizer with SAM first, and let the framework prepare that"
            )
        if factory is not None:
            raise TypeError("SAM was given a ready optimizer and a class to make one: leave the class out")
        if arguments:
            raise TypeError(_unknown_options(arguments))
        base = params_or_base
    elif callable(factory):
        params = params_or_base if isinstance(params_or_base, torch.Tensor) else list(params_or_base)
        if isinstance(params, list) and not params:
            raise ValueError("SAM got an empty parameter list: pass model.parameters() of a model that has some")
        base = _call(factory, params, arguments)
    else:
        raise TypeError(
            "SAM needs a base optimizer. Write SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05) or "
            "SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)"
        )
    _check_base(base)
    return base


def _check_base(base: Optimizer) -> None:
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS cannot be the base of SAM: it evaluates the loss at points of its own choice inside one step, so "
            "there is no single gradient at w + eps to hand to it. Use SGD, Adam, AdamW or another one"
        )
    if hasattr(base, "base_optimizer") and hasattr(base, "perturb"):
        raise ValueError("the base optimizer is already a SAM: wrap the plain optimizer once")


def _call(factory: Callable[..., Any], params: Any, arguments: dict[str, Any]) -> Optimizer:
    try:
        base = factory(params, **arguments)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        name = getattr(factory, "__name__", "the base optimizer")
        wrong = [key for key in arguments if f"'{key}'" in str(error)]
        near = difflib.get_close_matches(wrong[0], OPTIONS, n=1) if wrong else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(f"neither SAM nor {name} knows this option: {error}{hint}") from error
    if not isinstance(base, Optimizer):
        raise TypeError(f"the base optimizer must be a torch.optim.Optimizer, got {type(base).__name__}")
    return base
