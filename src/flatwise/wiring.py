"""What ties flatwise to its base optimizer: groups, hooks and what happens around the base's step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from flatwise.ascent import GradientAscent
from flatwise.batching import Batching
from flatwise.construct import checked_radius
from flatwise.descent import Descent, Late
from flatwise.eager import prepare
from flatwise.guards import PassGuard
from flatwise.joint import Joint
from flatwise.look import Look, Method
from flatwise.memory import STEP, Memory
from flatwise.nograd import no_grad
from flatwise.parallel import Ranks, SyncAscent, ranks
from flatwise.radius import DRAG, LOOKS, STEPS, AutoRadius, Gauge, Seen, first_looks
from flatwise.record import StepRecord
from flatwise.scaling import Scaling
from flatwise.schedule import Schedule
from flatwise.select import Selection, select
from flatwise.shards import any_sharded
from flatwise.update import add_late, clip, forget_verdict, withhold_nonfinite


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*args)

    return call


class Wired(Optimizer):
    """An optimizer whose groups, state and defaults are those of another one, and which takes part in its steps."""

    base_optimizer: Optimizer
    last: StepRecord
    """What the latest step did."""

    _wired = False
    _ascent: GradientAscent
    _descent: Descent
    _schedule: Schedule
    _batching: Batching
    _selection: Selection
    _memory: Memory
    _rho_function: Callable[[int], float] | None
    _rho_key: str
    _radii: list[float]
    _fresh_masks: bool
    _max_grad_norm: float | None
    _sync_ascent: SyncAscent
    _auto: AutoRadius | None
    _acting: Method
    """The method of this step: another one while it measures its radius."""

    def _wire(self, radius: float, model: Module | None = None) -> None:
        """Set up what is not saved: hooks and the guard."""
        prepare()
        self._default_rho = radius
        self._wired = True
        self._fixed: list[bool] = getattr(self, "_fixed", [])
        self._look: Look | None = None
        self._armed = self._unchecked = self._verdict_left = self._through_scaler = False
        self._late: Late | None = None
        self._gauge: Gauge | None = None
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
        self._acting = self._method
        self._guarded = 0
        # Weak, so that there is no cycle: a dropped optimizer removes its hooks at once, not amid a compilation.
        if isinstance(self.base_optimizer, Joint):
            for base in self.base_optimizer.bases:
                base.register_step_pre_hook(_weakly(self._refuse_while_perturbed))
        self.base_optimizer.register_step_pre_hook(_weakly(self._before_base_step))
        self.base_optimizer.register_step_post_hook(_weakly(self._after_base_step))
        self._adopt_groups()

    def _adopt_groups(self) -> None:
        """Give radii to groups that are new to us, also when they were added to the base."""
        groups = self.base_optimizer.param_groups
        if len(groups) == self._guarded and all(STEP in group and self._rho_key in group for group in groups):
            return
        self._fixed += [self._rho_key in group for group in groups[len(self._fixed) :]]
        radius = self._default_rho
        if self._auto is not None:  # what comes later joins in where the others are
            known = zip(groups[: self._guarded], self._fixed, strict=False)
            now = (group.get(self._rho_key) for group, fixed in known if not fixed)
            radius = next(filter(None, now), radius)
        for group in groups:
            group.setdefault(self._rho_key, radius)
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
        self._scaling.attach(grad_scaler, self._method.params()[0].device)

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

    def _step_base(self) -> None:
        """Let the base step, with what flatwise does before and after it."""
        base = self.base_optimizer
        if getattr(type(base).step, "hooked", False):
            base.step()
            return
        # A wrapper that leaves out torch's constructor (Lookahead of timm) has hooks that nobody calls.
        self._before_base_step()
        base.step()
        self._after_base_step()

    def _refuse_while_perturbed(self, *_: Any) -> None:
        if self._look is not None:
            raise RuntimeError(
                "the base optimizer was about to step while the weights are perturbed: "
                "leave the `with opt.perturbed()` block, or call opt.restore(), first"
            )

    @no_grad
    def _before_base_step(self, *_: Any) -> None:
        self._refuse_while_perturbed()
        if self._unchecked:
            self._unchecked = False
            fused = bool(getattr(self.base_optimizer, "_step_supports_amp_scaling", False))
            wait = self._scaling.on and (self._through_scaler or not fused)
            self._verdict_left = withhold_nonfinite(
                self.base_optimizer, self.last, self._late, first=self._scaling.on, wait=wait
            )
            self._guard.settle(self.last._finite)
            self._scaling.end()
            if self.last._reason == "schedule":  # which decided by the gradient: not a perturbed step
                self._memory.numbers.pop(STEPS, None)
            self._memory.settle(self.param_groups[0], self.last._finite)
            if self._gauge is not None:
                self._end_look(self._gauge)
            if self._max_grad_norm is not None:
                clip(self.base_optimizer, self.last, self._max_grad_norm)
            if self.last.rho:
                self._ascent.direction.learn(self._method.params(), self._memory, self.last._finite)

    def _end_look(self, gauge: Gauge) -> None:
        """Set the radii by what a look has shown, unless its update is withheld."""
        auto, self._gauge = self._auto, None
        if auto is None or not self.last.updated or self.last._reason == "schedule":
            return
        record, one_pass, kept = self.last, self._method.one_pass, self.param_groups[0]
        record._turn, record._drag = gauge.turn(), gauge.drag()
        drag = auto.smoothed(kept.get(DRAG), record._drag)
        loss, perturbed = self._losses()
        rise = (perturbed - loss) / loss if loss > 0 else math.nan
        nats = perturbed - loss if self._acting.ascent.direction.uses_gradient else math.nan
        seen, looks = Seen(record._turn, rise, drag, nats), int(kept.get(LOOKS, 0))
        kept.update({LOOKS: looks + 1} if drag is None else {LOOKS: looks + 1, DRAG: drag})
        settled = looks >= first_looks(one_pass=one_pass, total_steps=self._schedule.total_steps)
        for group, fixed in zip(self.param_groups, self._fixed, strict=True):
            if not fixed and group[self._rho_key] > 0:  # where it is 0, somebody has turned it off
                group[self._rho_key] = auto.next(
                    group[self._rho_key], seen, first=self._default_rho, settled=settled, one_pass=one_pass
                )

    def _losses(self) -> tuple[float, float]:
        """Return the losses at w and at w + eps, the mean over all ranks; NaN where they are not known."""
        losses = torch.tensor([self.last.loss, self.last.perturbed_loss], dtype=torch.float64)
        if ranks() > 1:
            params = self._method.params()
            if not (self._method.ranks.wrappers() or any_sharded(params)):
                return math.nan, math.nan  # ranks that do not know of each other see other losses, and would part
            losses = losses.to(params[0].device, torch.float32)
            torch.distributed.all_reduce(losses)
            losses /= ranks()
        loss, perturbed = losses.tolist()
        return loss, perturbed

    def _after_base_step(self, *_: Any) -> None:
        if self._verdict_left:
            self._verdict_left = False
            forget_verdict(self.base_optimizer)
        if self._late is not None:
            late, self._late = self._late, None
            add_late(self.base_optimizer, self.last, late)
        self._opt_called = True  # learning-rate schedulers on the wrapper ask whether a step was made
