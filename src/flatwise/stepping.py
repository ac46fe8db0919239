"""``step()``: with a closure, with a loss function and a batch, with several closures, and the base's step alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, overload

from torch import Tensor

from flatwise.accumulate import joined
from flatwise.construct import check_fit, checked_radius
from flatwise.eager import eagerly
from flatwise.functional import OutputGradients
from flatwise.look import Look
from flatwise.memory import STEP
from flatwise.passes import NO_CALLBACK, NO_CLOSURE, Closure, of_lightning
from flatwise.radius import LOOKS, STEPS, AutoRadius, Gauge
from flatwise.record import StepRecord
from flatwise.run import Run
from flatwise.saving import Saving

_NO_BATCH: Any = object()


class Stepping(Saving):
    """An optimizer that makes whole steps."""

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
        elif of_lightning(closure):
            loss = self._step_of_trainer(closure)
        else:
            loss = self._step_with_closure(closure, batch, each=each)
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, (closure,), {})
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # global step hooks fire in the base's step, once

    def _step_without_closure(self) -> None:
        if self._look is not None:
            raise RuntimeError("step() while the weights are perturbed: call opt.restore() or opt.second_step() first")
        if not self._armed:
            if not self._is_probe():
                raise RuntimeError(NO_CLOSURE)
            self._promise_memory()
        self._armed = False
        self._step_base()

    def _step_of_trainer(self, closure: Closure) -> Any:
        """Run the closure once: flatwise's callback makes both passes in it."""
        loss = closure()
        if not self._armed:
            raise RuntimeError(NO_CALLBACK)
        self._step_without_closure()
        return loss

    def _is_probe(self) -> bool:
        """Tell the dry step by which torch.distributed.checkpoint makes an optimizer create its state."""
        still = all(float(group.get("lr", 1.0)) == 0 for group in self.param_groups)
        return still and all(not p.grad.any() for g in self.param_groups for p in g["params"] if p.grad is not None)

    def _promise_memory(self) -> None:
        params = self._method.params()
        self._memory.promise(self._selection.moving(params), self._ascent.direction.remembers)
        self._memory.promise(params, self._descent.remembers)

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
        self._step_base()
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
        self._memory.forget()  # and what is left over of a step that failed
        self._late = None
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
        self._gauge, self._acting = None, self._method
        if active and self._auto is not None:
            self._begin_look(self._auto, record)
        return record, active

    def _begin_look(self, auto: AutoRadius, record: StepRecord) -> None:
        """Count a step whose radius sets itself, and let it look where it is time to."""
        group, method = self.param_groups[0], self._method
        steps, seen = int(group.get(STEPS, 0)), int(group.get(LOOKS, 0))
        self._memory.numbers[STEPS] = steps + 1
        if not auto.looks(steps, seen, one_pass=method.one_pass, total_steps=self._schedule.total_steps):
            return
        self._gauge = Gauge()
        if method.one_pass:
            stretch = self._ascent.direction.stretch(self.base_optimizer) or 1.0
            self._radii = [rho / stretch for rho in self._radii]
            record.rho = max(self._radii)
        self._acting = method.looking()

    def _rhos(self) -> list[float]:
        return [checked_radius(group[self._rho_key]) for group in self.param_groups]

    def _new_look(self, record: StepRecord, part: int = 0) -> Look:
        return Look(self._acting, self._radii, self._guard, record, part, self._gauge)

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
        return Run(self._acting, self._guard, record, active, lambda: self._new_look(record, next(parts)), outputs)

    def _count(self) -> None:
        self._memory.begin()
        for group in self.param_groups:
            group[STEP] += 1
