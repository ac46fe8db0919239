"""Sharpness-Aware Minimization as a ``torch.optim.Optimizer`` around another one.

One step, whatever the four slots answer::

    g   = gradient at w
    eps = ascent(g, w)                      ||T^-1 eps||_p = rho
    w  <- w + eps                           in place; an exact copy of w is kept
    g'  = gradient at w + eps
    w  <- the copy                          bit for bit, also when anything raised
    base_optimizer.step() with g'

This file is plumbing: forms of call, groups, state. The mathematics is in ``ascent`` and ``descent``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from flatwise.accumulate import joined
from flatwise.ascent import Ball, GradientAscent
from flatwise.batching import Batching
from flatwise.construct import check_fit, check_sync, checked_radius, make_base
from flatwise.descent import Descent, Late, PerturbedGradient
from flatwise.eager import eagerly, prepare
from flatwise.functional import OutputGradients
from flatwise.guards import PassGuard
from flatwise.look import Look, Method
from flatwise.memory import PREFIX, STEP, Memory, split_state
from flatwise.parallel import Ranks
from flatwise.passes import NO_CLOSURE, Closure
from flatwise.record import StepRecord
from flatwise.run import Run
from flatwise.scaling import Scaling
from flatwise.schedule import Radius, Schedule
from flatwise.select import select
from flatwise.update import add_late, clip, forget_verdict, spoil_unless, withhold_nonfinite

_NO_BATCH: Any = object()


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*args)

    return call


class SAM(Optimizer):
    """Sharpness-Aware Minimization (Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021) around any base optimizer.

    ``SAM(base, rho)`` wraps a ready optimizer; ``SAM(params, cls, rho, **arguments)`` makes it, as users of older SAM
    code know. ``param_groups``, ``state`` and ``defaults`` are the base's own; each group has its ``rho`` beside its
    ``lr`` (``sam_rho`` where the base has a ``rho`` of its own, as Adadelta does). A group with ``rho=0`` is left out
    of the norm, the copy and the perturbation.

    Args:
        params_or_base: a ready optimizer, or parameters or groups of them.
        base_optimizer: with parameters, the optimizer class (or a callable that makes one from parameters).
        rho: radius of the ball, >= 0, in units of the weights; or a function of the step (0, 1, ...) that returns
            it for every group that has no number of its own.
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

    base_optimizer: Optimizer
    last: StepRecord
    """What the latest step did."""

    _wired = False

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
        if isinstance(params_or_base, Optimizer) and base_optimizer is not None and rho is None:
            base_optimizer, rho = None, base_optimizer  # SAM(base, 0.05)
        rho = 0.05 if rho is None else rho
        self._rho_function: Callable[[int], float] | None = rho if callable(rho) else None
        radius = checked_radius(rho(0) if callable(rho) else rho)
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
        if callable(rho) and self._schedule.rho_min is not None:
            raise ValueError("rho_min ties the radius to the learning rate, so rho must be a number, not a function")
        if self._descent.needs_output and model is None:
            raise ValueError("a functional gradient replaces the gradient of the model's output: pass model=model")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0, or None for no clipping, got {max_grad_norm!r}")
        self._fresh_masks, self._max_grad_norm, self._sync_ascent = fresh_masks, max_grad_norm, sync_ascent
        self._selection, self._memory = select(self._ascent, model), Memory()
        base = make_base(params_or_base, base_optimizer, arguments)
        self._ascent.direction.check_base(base)
        self._rho_key = "sam_rho" if "rho" in base.defaults else "rho"
        for group in base.param_groups:  # before anything of the base is changed
            checked_radius(group.get(self._rho_key, radius))
        if not any(group["params"] for group in base.param_groups):
            raise ValueError("SAM got an empty parameter list: pass model.parameters() of a model that has some")
        self.base_optimizer = base
        super().__init__(base.param_groups, {**base.defaults, self._rho_key: radius})
        self._wire(radius, model)
        self.attach_scaler(grad_scaler)

    def _wire(self, radius: float, model: Module | None = None) -> None:
        """Set up what is not saved: hooks and the guard."""
        prepare()
        self._default_rho = radius
        self._wired = True
        self._fixed: list[bool] = getattr(self, "_fixed", [])
        self._look: Look | None = None
        self._armed = self._unchecked = self._verdict_left = self._through_scaler = False
        self._late: Late | None = None
        self.last = StepRecord()
        self._model: Callable[[], Module | None] = (lambda: None) if model is None else weakref.ref(model)
        self._scaling = Scaling()
        self._guard = PassGuard((), model, fresh_masks=self._fresh_masks)
        self._method = Method(
            self._ascent,
            self._descent,
            self._schedule,
            self._batching,
            self._selection,
            self._memory,
            self.base_optimizer,
            self._scaling,
            Ranks(self._sync_ascent, self._guard.modules),
        )
        self._guarded = 0
        # Weak, so that there is no cycle: a dropped optimizer removes its hooks at once, not amid a compilation.
        self.base_optimizer.register_step_pre_hook(_weakly(self._before_base_step))
        self.base_optimizer.register_step_post_hook(_weakly(self._after_base_step))
        self._adopt_groups()

    def _adopt_groups(self) -> None:
        """Give radii to groups that are new to us, also when they were added to the base."""
        groups = self.base_optimizer.param_groups
        if len(groups) == self._guarded and all(STEP in group and self._rho_key in group for group in groups):
            return
        self._fixed += [self._rho_key in group for group in groups[len(self._fixed) :]]
        for group in groups:
            group.setdefault(self._rho_key, self._default_rho)
            group.setdefault(STEP, 0)
        if len(groups) > self._guarded:
            self._guard.expect(p for g in groups[self._guarded :] for p in g["params"])
            model = self._model()
            if model is not None and self._guarded:
                self._selection = self._method.selection = select(self._ascent, model)
            self._guarded = len(groups)

    # The base's groups, state and defaults are the only ones: a second copy would go stale.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own parameter groups, with ``rho`` in each."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._wired:
            self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if self._wired:
            self.base_optimizer.state = state

    @property
    def wants_sample_losses(self) -> bool:
        """Whether ``loss_fn(batch)`` must return one loss for each sample, not their mean."""
        return self._batching.ranks

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, with a radius.

        Args:
            param_group: as for the base, with an optional ``"rho"``.
        """
        if not self._wired:
            return  # torch's constructor shows us the groups that the base already has
        checked_radius(param_group.get(self._rho_key, self._default_rho))
        self.base_optimizer.add_param_group(param_group)
        self._adopt_groups()

    def attach_scaler(self, grad_scaler: Any) -> None:
        """Work with losses that a ``torch.amp.GradScaler`` scales. Not saved: attach it again after unpickling.

        The closure calls ``scaler.scale(loss).backward()``, and ``scaler.update()`` follows the step; nothing else
        changes. flatwise unscales every pass. An infinity or NaN in any pass of a step keeps weights, the base's state
        and buffers as they were before it, and the scaler backs off once.

        Args:
            grad_scaler: the scaler; None detaches it.

        Raises:
            ValueError: if the method differentiates gradients whose scale matters.
        """
        if grad_scaler is not None and self._descent.adds_term and not self._ascent.ball.normalised:
            raise ValueError("second_order=True with normalised=False differentiates scaled gradients: use float32")
        self._scaling.attach(grad_scaler, self.param_groups[0]["params"][0].device)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell ``scaler.step(opt, closure)`` that the gradients are ours to unscale, unless a framework made them."""
        return not self._armed

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters.

        Args:
            set_to_none: remove them instead of filling them with zeros.
        """
        self.base_optimizer.zero_grad(set_to_none)
        self._guard.forget_start()

    # Forms of call

    @overload  # type: ignore[override]  # returns the loss as a tensor, and takes a batch
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure | Sequence[Closure], *, each: bool = False) -> Tensor: ...

    @overload
    def step(self, closure: Callable[[Any], Any], batch: Any) -> Tensor: ...

    @eagerly
    def step(self, closure: Any = None, batch: Any = _NO_BATCH, *, each: bool = False) -> Any:
        """Take one step.

        A RuntimeError names what is wrong and shows the right call: no closure, no gradient, gradients that were not
        cleared, a graph kept from the first pass. The weights are as before then.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()`` and returns the loss; it runs twice,
                with gradients enabled. With ``batch``: a function of the batch that returns its mean loss, and
                flatwise does the rest. None only after :meth:`restore`, as frameworks call it: the base's step.
                A list of closures accumulates: each does forward and backward on its micro-batch, without clearing
                gradients, and returns its share of the loss; all of them are replayed in every pass.
            batch: any nesting of tuples, lists and mappings of tensors.
            each: with a list, one perturbation for each closure (m-sharpness) instead of one for all.

        Returns:
            The loss at w, detached; None without a closure.
        """
        for hook in list(self._optimizer_step_pre_hooks.values()):
            hook(self, (closure,), {})
        loss = None
        if closure is None:
            self._step_without_closure()
        else:
            loss = self._step_with_closure(closure, batch, each=each)
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, (closure,), {})
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # global step hooks fire in the base's step, once

    def first_step(self, zero_grad: bool = False) -> bool:
        """Move the weights to w + eps, along the gradients that the first backward pass left in ``.grad``.

        The gradients are used up: ``.grad`` is None afterwards, whatever ``zero_grad`` says. Always run the second pass
        and :meth:`second_step`, also where the schedule is not active and the weights stay at w.

        Args:
            zero_grad: accepted for users of older code.

        Returns:
            Whether the weights were moved. Without gradients, or if they are already moved, a RuntimeError says so.
        """
        del zero_grad
        return self._open("first_step()", always=True)

    def second_step(self, zero_grad: bool = False) -> None:
        """Bring the weights back and let the base optimizer step with the gradients at w + eps.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: if :meth:`first_step` was not called, or there are no gradients.
        """
        if self._look is None:
            raise RuntimeError("second_step() without first_step(): call loss.backward(), then opt.first_step()")
        self._restore(finish=True, last=True)
        if not self._method.has_gradients():
            self._armed = False
            raise RuntimeError("no gradients for second_step(): run the second forward and backward pass before it")
        self.step()
        if zero_grad:
            self.zero_grad()

    @contextmanager
    def perturbed(self) -> Iterator[bool]:
        """Be at w + eps inside the ``with`` block, and exactly at w after it, also when it raises.

        Run the first backward pass before it, the second inside, and ``opt.base_optimizer.step()`` after it. On entry
        ``.grad`` is taken away, so the second pass starts without gradients.

        Yields:
            Whether the weights were moved.
        """
        moved = self._open("perturbed()", always=True)
        finished = False
        try:
            yield moved
            finished = True
        finally:
            self._restore(finish=finished)
            self._armed = False

    def perturb(self) -> bool:
        """Move the weights to w + eps if the gradients in ``.grad`` allow it; for frameworks.

        Returns:
            True: the weights are at w + eps, ``.grad`` is None; run the second pass, then :meth:`restore`. False: no
            usable gradient, or the schedule is not active; weights and gradients are untouched, and ``step()``
            without closure is the base's step. On an accelerator the size of the gradient is not read back, so
            only missing gradients give False there; zero and non-finite ones do no harm. If the weights are already
            moved, a RuntimeError says so.
        """
        return self._open("perturb()", always=False)

    def restore(self) -> None:
        """Bring the weights back bit for bit, and let the next ``step()`` without closure be the base's step."""
        self._restore(finish=True)

    def _abandon(self) -> None:
        """Bring the weights back after a second pass that failed: there is nothing to step with."""
        self._restore(finish=False)
        self._armed = False

    @eagerly
    def _restore(self, *, finish: bool, last: bool = False) -> None:
        """Bring the weights back. ``last`` says that nobody else unscales the gradients."""
        look, self._armed = self._look, True
        if look is not None:
            try:
                look.close()
            except BaseException:
                look.close()  # interrupted: what is restored must be restored whole
                raise
            finally:
                self._look = None
            if finish and last:
                self._method.unscale()
                self._late = look.finish()
            elif finish:
                self._finish_scaled(look)

    def _finish_scaled(self, look: Look) -> None:
        """Finish where a framework will unscale the gradients later."""
        params = self._method.params()
        mixes = look.moved and self._descent.needs_clean
        if mixes:
            self._scaling.scale(params, back=True)
        self._late = look.finish()
        if mixes:
            self._scaling.scale(params)
        norm = self.last._norm
        if self._scaling.on and norm is not None and not norm.is_cpu:
            # The framework's scaler sees the last gradient only: an infinity in the first must show in it.
            spoil_unless(torch.isfinite(norm), [p.grad for p in params if p.grad is not None])

    # The steps behind them

    @eagerly
    def _open(self, name: str, *, always: bool) -> bool:
        """Begin a second pass that happens outside flatwise."""
        if self._look is not None:
            raise RuntimeError(f"{name} while the weights are perturbed: call opt.restore() or second_step() first")
        needs_closure = self._batching.splits or self._ascent.steps > 1 or self._descent.adds_term
        if needs_closure or self._descent.needs_output:
            raise RuntimeError(
                f"{name} cannot serve micro_batch_size, fractions of a batch, ascent_steps, second_order or a "
                "functional gradient, which compute gradients of their own: use opt.step(loss_fn, batch), or "
                "opt.step(closure) for the last three"
            )
        one_pass, unscaled = self._method.one_pass, False
        local = self._method.ranks.local and not one_pass
        if always and not one_pass and not self._method.has_gradients():
            raise RuntimeError(f"no gradients for {name}: call loss.backward() before it")
        record, active = self._begin()
        if not one_pass:
            self._guard.first_pass_done()
            self._guard.listen_to_roots()
            if active:
                self._method.unscale()
                active = self._new_run(record, active).accepts()
                unscaled = True
                # Where gradients are a rank's own, one rank must not leave out a pass that the others make.
                always = always or local
            if local:
                self._method.ranks.share(self._method.params())
        record.passes = 1.0 + (always and not one_pass)
        look = self._new_look(record)
        moved = False
        self._look = look
        try:
            moved = active and look.displace()
            if moved or always:
                self._method.clear()
                if not one_pass:
                    self._guard.between()
        except BaseException:
            self._abandon()
            raise
        if not (moved or always):
            self._look, self._armed = None, True
            if unscaled:
                self._scaling.scale(self._method.params())  # the framework unscales them again
            look.finish()
            self._guard.leave_step()
        elif moved and not one_pass:
            record.passes = 2.0
        self._count()
        return moved or (local and active)

    def _step_without_closure(self) -> None:
        if self._look is not None:
            raise RuntimeError("step() while the weights are perturbed: call opt.restore() or opt.second_step() first")
        if not self._armed and not self._is_probe():
            raise RuntimeError(NO_CLOSURE)
        self._armed = False
        self.base_optimizer.step()

    def _is_probe(self) -> bool:
        """Tell the dry step by which torch.distributed.checkpoint makes an optimizer create its state."""
        still = all(float(group.get("lr", 1.0)) == 0 for group in self.param_groups)
        return still and all(not p.grad.any() for g in self.param_groups for p in g["params"] if p.grad is not None)

    def _step_with_closure(self, closure: Any, batch: Any, *, each: bool) -> Tensor | float:
        if self._look is not None:
            raise RuntimeError("step() while the weights are perturbed: call opt.restore() or opt.second_step() first")
        if batch is _NO_BATCH and self._batching.splits:
            raise RuntimeError(
                "micro_batch_size and the fractions of a batch cut the batch, so flatwise must see it: "
                "call opt.step(loss_fn, batch), where loss_fn(batch) returns the mean loss (for top_fraction and "
                "rising_fraction, one loss for each sample)"
            )
        if each or isinstance(closure, list | tuple):
            self._check_closures(closure, batch, each=each)
        self._through_scaler = self._scaling.through_scaler(self)
        self._armed = False
        record, active = self._begin()
        self._guard.await_verdict(self._scaling.on and active)
        run = self._new_run(record, active)
        if batch is not _NO_BATCH:
            loss = run.batch(closure, batch)
        elif each:
            loss = run.each(closure)
        else:
            loss = run.whole(self._joined(closure) if isinstance(closure, list | tuple) else closure)
        self._late = run.late
        self.base_optimizer.step()
        self._count()
        return loss

    def _joined(self, closures: Sequence[Closure]) -> Closure:
        return joined(closures, self._method.clear, self._method.params(), self._method.ranks.apart)

    def _check_closures(self, closures: Any, batch: Any, *, each: bool) -> None:
        if batch is not _NO_BATCH or not isinstance(closures, list | tuple):
            raise TypeError("several closures make a batch: opt.step([closure, ...]), with each=True for one each")
        if not closures or not all(map(callable, closures)):
            raise TypeError("opt.step([...]) takes a list of at least one closure, each of which can be called")
        if each:  # each of them is a micro-batch of its own, and what cannot be so split is refused by name
            check_fit(self._ascent, self._descent, self._schedule, replace(self._batching, micro_batch_size=1))

    def _begin(self) -> tuple[StepRecord, bool]:
        """Open the record of a step, and bring the radii up to date."""
        self._adopt_groups()
        self._scaling.begin()
        self._method.ranks.begin()
        step = int(self.param_groups[0][STEP])
        if self._rho_function is not None:
            radius = checked_radius(self._rho_function(step))
            for group, fixed in zip(self.param_groups, self._fixed, strict=True):
                if not fixed:
                    group[self._rho_key] = radius
        for group in self.param_groups:
            self._schedule.tie_radius(group, self._rho_key)
        rhos = self._rhos()
        self._radii = rhos
        self.last = record = StepRecord(step=step, rho=max(rhos))
        self._unchecked = True
        active = record.rho > 0 and self._schedule.active(step)
        if not active:
            record._reason = "zero radius" if record.rho == 0 else "schedule"
        return record, active

    def _rhos(self) -> list[float]:
        return [checked_radius(group[self._rho_key]) for group in self.param_groups]

    def _new_look(self, record: StepRecord, part: int = 0) -> Look:
        return Look(self._method, self._radii, self._guard, record, part)

    def _new_run(self, record: StepRecord, active: bool) -> Run:
        outputs = None
        if self._descent.needs_output and active:
            model = self._model()
            if model is None:
                raise RuntimeError(
                    "the model is not known to a copied optimizer, and is gone or was never given: "
                    "make the optimizer anew with model=model, and load_state_dict() into it"
                )
            outputs = OutputGradients(model)
        parts = itertools.count()
        return Run(self._method, self._guard, record, active, lambda: self._new_look(record, next(parts)), outputs)

    def _count(self) -> None:
        for group in self.param_groups:
            group[STEP] += 1

    def _before_base_step(self, *_: Any) -> None:
        if self._look is not None:
            raise RuntimeError(
                "the base optimizer was about to step while the weights are perturbed: "
                "leave the `with opt.perturbed()` block, or call opt.restore(), first"
            )
        if self._unchecked:
            self._unchecked = False
            fused = bool(getattr(self.base_optimizer, "_step_supports_amp_scaling", False))
            wait = self._scaling.on and (self._through_scaler or not fused)
            self._verdict_left = withhold_nonfinite(
                self.base_optimizer, self.last, self._late, first=self._scaling.on, wait=wait
            )
            self._guard.settle(self.last._finite)
            if self._max_grad_norm is not None:
                clip(self.base_optimizer, self.last, self._max_grad_norm)
            if self.last.rho:
                self._ascent.direction.learn(self._method.params(), self._memory, self.last._finite)

    def _after_base_step(self, *_: Any) -> None:
        if self._verdict_left:
            self._verdict_left = False
            forget_verdict(self.base_optimizer)
        if self._late is not None:
            late, self._late = self._late, None
            add_late(self.base_optimizer, self.last, late)
        self._opt_called = True  # learning-rate schedulers on the wrapper ask whether a step was made

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, with radii and step count in its groups; no copies of weights.

        Returns:
            A dictionary in the standard form of ``torch.optim``.

        Raises:
            RuntimeError: if the weights are perturbed: what is saved now would be saved beside wrong weights.
        """
        if self._look is not None:
            raise RuntimeError("state_dict() while the weights are perturbed: call opt.restore() first")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = self.base_optimizer.state_dict()
        for index, entries in self._memory.save(self.param_groups).items():
            saved["state"][index] = {**saved["state"].get(index, {}), **entries}
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    def base_state_dict(self) -> dict[str, Any]:
        """Return a checkpoint of the plain base optimizer, without flatwise's entries.

        Returns:
            A dictionary that the base's class loads.
        """
        saved = self.state_dict()
        saved["state"], _ = split_state(saved["state"])
        saved["param_groups"] = [
            {k: v for k, v in g.items() if k != self._rho_key and not k.startswith(PREFIX)}
            for g in saved["param_groups"]
        ]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of the plain base optimizer (radii stay as they are then).

        Args:
            state_dict: from :meth:`state_dict`, or from the base's class.
        """
        radii = [group.get("sam_rho_max", group[self._rho_key]) for group in self.param_groups]
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        base_state, own_state = split_state(state_dict["state"])
        self.base_optimizer.load_state_dict({**state_dict, "state": base_state})
        self._memory.load(self.param_groups, own_state, state_dict["param_groups"])
        for group, radius in zip(self.param_groups, radii, strict=True):
            group.setdefault(self._rho_key, radius)
        self._adopt_groups()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``copy`` and ``pickle`` keep: everything but hooks, the guard and the latest record."""
        if self._look is not None:
            raise RuntimeError("copying the optimizer while the weights are perturbed: call opt.restore() first")
        kept = ("base_optimizer", "defaults", "_rho_function", "_rho_key", "_fixed", "_default_rho")
        slots = ("_ascent", "_descent", "_schedule", "_batching", "_selection", "_memory")
        options = ("_fresh_masks", "_max_grad_norm", "_sync_ascent")
        return {name: self.__dict__[name] for name in (*kept, *slots, *options)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy.

        Args:
            state: from :meth:`__getstate__`.
        """
        self.__dict__.update(state)
        super().__setstate__({})  # torch's hooks
        self._wire(self._default_rho)
