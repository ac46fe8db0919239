"""Sharpness-Aware Minimization as a ``torch.optim.Optimizer`` around another one.

One step, whatever the four slots answer::

    g   = gradient at w
    eps = ascent(g, w)                      ||T^-1 eps||_p = rho
    w  <- w + eps                           in place; an exact copy of w is kept
    g'  = gradient at w + eps
    w  <- the copy                          bit for bit, also when anything raised
    base_optimizer.step() with g'

This file is the constructor. ``wiring`` ties the optimizer to its base, ``saving`` saves it, ``stepping`` and
``outside`` are its forms of call. The mathematics is in ``ascent`` and ``descent``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, overload

from torch.nn import Module
from torch.optim import Optimizer

from flatwise.ascent import Ball, GradientAscent
from flatwise.batching import Batching
from flatwise.construct import check_fit, check_sharded, check_sync, checked_radius, make_base
from flatwise.descent import Descent, PerturbedGradient
from flatwise.memory import Memory
from flatwise.outside import Outside
from flatwise.radius import Radius, as_auto
from flatwise.schedule import Schedule
from flatwise.select import select


def _is_ready(base: Any) -> bool:
    """Tell a ready optimizer, or several, from parameters."""
    several = base if isinstance(base, list | tuple) else [base]
    return bool(several) and all(isinstance(one, Optimizer) for one in several)


class SAM(Outside):
    """Sharpness-Aware Minimization (Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021) around any base optimizer.

    ``SAM(base, rho)`` wraps a ready optimizer; ``SAM(params, cls, rho, **arguments)`` makes it, as users of older SAM
    code know. ``param_groups``, ``state`` and ``defaults`` are the base's own; each group has its ``rho`` beside its
    ``lr`` (``sam_rho`` where the base has a ``rho`` of its own, as Adadelta does). A group with ``rho=0`` is left out
    of the norm, the copy and the perturbation.

    Args:
        params_or_base: a ready optimizer, or parameters or groups of them; or a list of ready optimizers of different
            parameters, which then share one perturbation with one norm and step together.
        base_optimizer: with parameters, the optimizer class (or a callable that makes one from parameters).
        rho: radius of the ball, >= 0, in units of the weights; or a function of the step (0, 1, ...) that returns
            it for every group that has no number of its own; or ``"auto"``, or a :class:`flatwise.AutoRadius`: it sets
            itself (docs/frugal.md).
        p: order of the ball's norm, 1 <= p <= inf.
        adaptive: scale the ball by ``|w| + eta`` (ASAM; Kwon et al., ICML 2021), on every parameter. Wants a
            radius about ten times larger.
        eta: offset of the scaling, >= 0.
        ascent_steps: gradient steps of the inner maximisation (App. C.6).
        second_order: add the term that SAM drops (section 3): one Hessian-vector product, as a third pass.
        ascent: the slot as an object, instead of ``p``, ``adaptive``, ``eta`` and ``ascent_steps``.
        descent: the slot as an object, instead of ``second_order``.
        schedule: the slot as an object, instead of ``every``, ``window`` and ``total_steps``.
        batching: the slot as an object, instead of ``micro_batch_size`` and ``ascent_fraction``.
        micro_batch_size: m of m-sharpness: one perturbation for each m samples. Needs ``step(loss_fn, batch)``.
        ascent_fraction: share of the batch that the ascent sees. Needs ``step(loss_fn, batch)``.
        every: perturb on every k-th step only.
        window: perturb only between these fractions of ``total_steps``.
        total_steps: planned length of the training, where ``window`` needs it.
        model: the module whose buffers to protect, where it cannot be found by watching (a loss function that was
            compiled before the first step). Not saved.
        fresh_masks: draw new dropout masks in the second pass instead of the same ones.
        sync_ascent: under ``DistributedDataParallel``: True, and by default, one perturbation for the global batch;
            False one for each rank (m-sharpness; the first pass sums no gradients); n one for every n consecutive
            ranks. False and n need ``model=`` with the wrapped module.
        grad_scaler: see :meth:`attach_scaler`.
        max_grad_norm: clip the last gradient, the one that the base optimizer sees, to this L2 norm over all groups.
            The gradient that is climbed along is not clipped.
        **arguments: for the base optimizer's class.

    Raises:
        TypeError: if an option is unknown (the nearest known one is named), or a slot and its short options are both
            given.
        ValueError: if a number is out of its range, the parameter list is empty, or the base cannot be one (LBFGS).
    """

    @overload
    def __init__(self, params_or_base: Optimizer, base_optimizer: Radius = 0.05, /, **options: Any) -> None: ...

    @overload
    def __init__(
        self,
        params_or_base: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: Radius = 0.05,
        **options: Any,
    ) -> None: ...

    @overload
    def __init__(self, params_or_base: Any, **options: Any) -> None: ...

    def __init__(  # type: ignore[misc]  # mypy does not see that the positional-only form is covered
        self,
        params_or_base: Any,
        base_optimizer: Any = None,
        rho: Any = None,
        *,
        p: float = 2.0,
        adaptive: bool = False,
        eta: float = 0.0,
        ascent_steps: int = 1,
        second_order: bool = False,
        ascent: GradientAscent | None = None,
        descent: Descent | None = None,
        schedule: Schedule | None = None,
        batching: Batching | None = None,
        micro_batch_size: int | None = None,
        ascent_fraction: float = 1.0,
        every: int = 1,
        window: tuple[float, float] = (0.0, 1.0),
        total_steps: int | None = None,
        model: Module | None = None,
        fresh_masks: bool = False,
        sync_ascent: bool | int | None = None,
        grad_scaler: Any = None,
        max_grad_norm: float | None = None,
        **arguments: Any,
    ) -> None:
        if rho is None and not isinstance(base_optimizer, type) and _is_ready(params_or_base):
            base_optimizer, rho = None, base_optimizer  # SAM(base, 0.05)
        rho = 0.05 if rho is None else rho
        self._auto = as_auto(rho)
        self._rho_function: Callable[[int], float] | None = rho if callable(rho) else None
        by_name = (
            ("ascent", ascent, (p, adaptive, eta, ascent_steps) != (2.0, False, 0.0, 1)),
            ("descent", descent, second_order),
            ("schedule", schedule, (every, tuple(window), total_steps) != (1, (0.0, 1.0), None)),
            ("batching", batching, (micro_batch_size, ascent_fraction) != (None, 1.0)),
        )
        for slot, value, shorthand in by_name:
            if value is not None and shorthand:
                raise TypeError(f"{slot}= and its short options were both given: put the options into {slot}=")
        self._ascent = ascent or GradientAscent(Ball(p, adaptive, eta), ascent_steps)
        self._descent = descent or PerturbedGradient(second_order)
        self._schedule = schedule or Schedule(every, window, total_steps)
        self._batching = batching or Batching(micro_batch_size, ascent_fraction)
        check_fit(self._ascent, self._descent, self._schedule, self._batching)
        check_sync(sync_ascent, self._ascent, self._descent, self._schedule)
        if (callable(rho) or self._auto) and self._schedule.rho_min is not None:
            raise ValueError(
                "rho_min ties the radius to the learning rate, so rho must be a number, not "
                f"{'a function' if callable(rho) else repr('auto')} (rho_min=None unties it)"
            )
        if self._auto and sync_ascent not in (None, True):
            raise ValueError(
                f"rho='auto' measures the perturbation that all ranks share, which sync_ascent={sync_ascent!r} keeps "
                "apart on every rank. Use sync_ascent=True"
            )
        if self._descent.needs_output and model is None:
            raise ValueError("a functional gradient replaces the gradient of the model's output: pass model=model")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0, or None for no clipping, got {max_grad_norm!r}")
        self._fresh_masks, self._max_grad_norm, self._sync_ascent = fresh_masks, max_grad_norm, sync_ascent
        if self._ascent.direction is not (bound := self._ascent.direction.bound(model)):
            self._ascent = replace(self._ascent, direction=bound)
        self._selection, self._memory = select(self._ascent, model), Memory()
        base = make_base(params_or_base, base_optimizer, arguments)
        check_sharded((p for g in base.param_groups for p in g["params"]), self._ascent, self._descent, sync_ascent)
        self._ascent.direction.check_base(base)
        stretch = self._ascent.direction.stretch(base) or 1.0
        radius = checked_radius(rho(0) if callable(rho) else self._auto.first(stretch) if self._auto else rho)
        self._rho_key = "sam_rho" if "rho" in base.defaults else "rho"
        for group in base.param_groups:  # before anything of the base is changed
            checked_radius(group.get(self._rho_key, radius))
        if not any(group["params"] for group in base.param_groups):
            raise ValueError("SAM got an empty parameter list: pass model.parameters() of a model that has some")
        self.base_optimizer = base
        super().__init__(base.param_groups, {**base.defaults, self._rho_key: radius})
        self._wire(radius, model)
        self.attach_scaler(grad_scaler)
