"""One step with a closure, or with a loss function and a batch: the passes in their order."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flatwise.accumulate import joined
from flatwise.batching import count, largest, pick
from flatwise.descent import Late
from flatwise.directions import joint_gradient_norm
from flatwise.functional import OutputGradients
from flatwise.guards import PassGuard
from flatwise.look import Look, Method
from flatwise.parallel import spoiled_unless
from flatwise.passes import (
    NO_GRADIENTS,
    NOT_IN_THE_LOSS,
    TOO_FEW,
    Closure,
    first_pass,
    from_loss_fn,
    later_pass,
    refuse_stale_gradients,
    sample_losses,
)
from flatwise.record import StepRecord
from flatwise.true_gradient import true_gradients

Loss = Tensor | float


@dataclass
class Cost:
    """Share of the batch whose gradient a pass computes."""

    first: float = 1.0
    second: float = 1.0


@dataclass
class Run:
    """What one step needs.

    Attributes:
        method: the four slots.
        guard: protects buffers and random state.
        record: takes what happened.
        active: whether the schedule wants a perturbation.
        new_look: makes the displaced state of one part of the batch.
        outputs: where the second pass starts from the output gradients of the first.
        late: what is to be taken from the weights after the base's step.
    """

    method: Method
    guard: PassGuard
    record: StepRecord
    active: bool
    new_look: Callable[[], Look]
    outputs: OutputGradients | None = None
    late: Late | None = None

    def whole(self, closure: Closure) -> Loss:
        """Run a step with the user's closure, and leave the gradient for the base optimizer in ``.grad``.

        Args:
            closure: clears gradients, forward, backward, returns the loss.

        Returns:
            The loss of the first pass.
        """
        return self._part(closure, closure)

    def batch(self, loss_fn: Any, batch: Any) -> Loss:
        """Run every micro-batch, and leave the average of their gradients in ``.grad``.

        Args:
            loss_fn: the user's function of a batch.
            batch: the batch.

        Returns:
            The loss of the first pass, averaged.
        """
        parts = self.method.batching.parts(batch)
        if len(parts) == 1:
            return self._batch_part(loss_fn, parts[0][0], 1.0)
        return self._summed([(share, partial(self._batch_part, loss_fn, part, share)) for part, share in parts])

    def each(self, closures: Sequence[Closure]) -> Loss:
        """Run every closure with a perturbation of its own, and leave the sum of their gradients in ``.grad``.

        Args:
            closures: each does forward and backward on its micro-batch, and returns its share of the loss.

        Returns:
            The sum of their losses in the first pass.
        """
        clear, share = self.method.clear, 1 / len(closures)

        def run(closure: Closure) -> Loss:
            return self._part(own := joined([closure], clear, ()), own, share=share, own=True)

        return self._summed([(1.0, partial(run, closure)) for closure in closures])

    def _summed(self, parts: Sequence[tuple[float, Callable[[], Loss]]]) -> Loss:
        """Run parts of a batch, and leave the weighted sum of their gradients in ``.grad``."""
        record = self.record
        returned: list[Loss] = []
        clean: list[Loss] = []
        perturbed: list[Loss] = []
        total: dict[Tensor, Tensor] = {}
        for weight, run in parts:
            returned.append(run() * weight)
            for losses, loss in ((clean, record._loss), (perturbed, record._perturbed_loss)):
                if loss is not None:
                    losses.append(loss * weight)
            record._loss = record._perturbed_loss = None
            for param in self.method.params():
                if param.grad is not None:
                    known, grad = total.get(param), param.grad * weight
                    total[param] = grad if known is None else known.add_(grad)
        self.method.clear()
        for param, grad in total.items():
            param.grad = grad
        record._loss = sum(clean) if clean else None
        record._perturbed_loss = sum(perturbed) if perturbed else None
        return sum(returned)

    def _batch_part(self, loss_fn: Any, part: Any, share: float) -> Loss:
        try:
            return self._checked_part(loss_fn, part, share)
        except ValueError as error:
            if "more than 1 value per channel" in str(error) and self.method.batching.splits:
                raise ValueError(TOO_FEW + str(error)) from error
            raise

    def _checked_part(self, loss_fn: Any, part: Any, share: float) -> Loss:
        batching = self.method.batching
        ranks = batching.ranks
        if self.active and batching.top_fraction < 1:
            return self._top_part(loss_fn, part, share)
        samples = count(part) if ranks else None
        before: list[Tensor] = []
        descend = self._closure(loss_fn, part, samples, before.append)
        if self.active and ranks and not self.method.looks:  # a look compares two gradients of the same samples
            cost = Cost(second=batching.rising_fraction)
            rising = self._rising(loss_fn, part, before)
            return self._part(descend, rising, share=share, cost=cost, own=True)
        seen = batching.for_ascent(part) if self.active else part
        if seen is part:
            return self._part(descend, descend, share=share, own=True)
        ascend = self._closure(loss_fn, seen)
        cost = Cost(first=batching.ascent_fraction)
        return self._part(ascend, descend, share=share, cost=cost, own=True, split=True)

    def _top_part(self, loss_fn: Any, part: Any, share: float) -> Loss:
        """K-SAM: both passes on the samples with the largest loss; the ranking pass is the one that counts."""
        batching, guard = self.method.batching, self.guard
        self._warm_up(self._closure(loss_fn, part, count(part)))
        guard.enter_step()
        try:
            try:
                losses = self._losses(loss_fn, part)
                guard.first_pass_done()
                guard.between()
                index = largest(losses, batching.top_fraction)
                closure = self._closure(loss_fn, pick(part, index), index.numel())
                cost = Cost(batching.top_fraction, batching.top_fraction)
                self._part(closure, closure, share=share, cost=cost, own=True, ranked=True)
            finally:
                guard.close()
        finally:  # as in _part
            guard.close()
        return losses.mean()

    def _rising(self, loss_fn: Any, part: Any, before: list[Tensor]) -> Closure:
        """ESAM: the second pass on the samples whose loss rises most."""

        def closure() -> Any:
            after = self._losses(loss_fn, part)
            index = largest(after - before[0], self.method.batching.rising_fraction)
            self.guard.rewind()
            return self._closure(loss_fn, pick(part, index), index.numel())()

        return closure

    def _closure(
        self, loss_fn: Any, part: Any, samples: int | None = None, seen: Callable[[Tensor], None] | None = None
    ) -> Closure:
        return from_loss_fn(loss_fn, part, self.method.clear, samples, seen, self.method.scaling.scaled)

    def _losses(self, loss_fn: Any, part: Any) -> Tensor:
        """Return the loss of each sample, by a forward pass without gradients."""
        with torch.no_grad():
            losses = sample_losses(loss_fn(part), count(part))
        torch.clear_autocast_cache()  # casts made here have no graph
        self.record.closure_calls += 1
        return losses

    def _part(
        self,
        ascend: Closure,
        descend: Closure,
        *,
        share: float = 1.0,
        cost: Cost | None = None,
        own: bool = False,
        split: bool = False,
        ranked: bool = False,
    ) -> Loss:
        """Run one micro-batch: leave its gradient for the base optimizer in ``.grad``, and everything else as before.

        ``own`` says that the closure is flatwise's and clears gradients by itself, ``split`` that the ascent sees other
        samples than the descent, ``ranked`` that the pass that counts for buffers and random state is already done.
        """
        look = self.new_look()
        try:
            try:
                return self._passes(look, ascend, descend, share, cost or Cost(), own=own, split=split, ranked=ranked)
            finally:
                self._close(look, ranked=ranked)
        finally:  # an interrupt can come between the lines of the one above; closing again does no harm
            self._close(look, ranked=ranked)

    def _passes(
        self,
        look: Look,
        ascend: Closure,
        descend: Closure,
        share: float,
        cost: Cost,
        *,
        own: bool,
        split: bool,
        ranked: bool,
    ) -> Loss:
        """Run the passes of :meth:`_part`, which brings the weights back after them."""
        guard, record, method = self.guard, self.record, self.method
        steps, one_pass = method.ascent.steps, method.one_pass and self.active
        local = self.local
        if not ranked:
            self._warm_up(ascend)
            guard.enter_step(replays=self.active and not one_pass)
        moved = one_pass and look.displace()
        with (
            nullcontext() if own else refuse_stale_gradients(method.base.param_groups),
            method.ranks.apart() if local else nullcontext(),
        ):
            loss, cheap = self._first(look, ascend)
        method.unscale()
        if local:
            method.ranks.share(method.params())
        if moved:
            record._perturbed_loss = loss
        else:
            record._loss = loss
        if ranked:
            guard.rewind()
        else:
            guard.first_pass_done()
        record.closure_calls += 1
        record.passes += share * cost.first
        if not self.method.has_gradients():
            raise RuntimeError(NO_GRADIENTS)
        if one_pass:
            return loss
        if not (self.active and self.accepts()):
            look.finish()
            return loss
        look.keep_random = split
        moved = look.displace()
        # Where gradients are a rank's own, one rank must not leave out a pass that the others make.
        if not (moved or split or cheap or local):
            return loss
        self.method.clear()
        if not ranked:
            guard.between()
        for _ in range(steps - 1):
            with method.ranks.apart() if local else nullcontext(), true_gradients():
                later_pass(ascend)
            method.unscale()
            if local:
                method.ranks.share(method.params())
            look.displace()
            self.method.clear()
            guard.rewind()
        with nullcontext() if self.outputs is None else self.outputs.put(), self._verdict(local=local):
            record._perturbed_loss = later_pass(descend)
        method.unscale()
        record.closure_calls += steps
        record.passes += share * (cost.second + cost.first * (steps - 1))
        if not self.method.has_gradients():
            raise RuntimeError(
                "the closure left no gradients in its second run: it must call loss.backward() each time"
            )
        look.undo()
        look.compare()  # after it, when the copy of the weights is gone
        if method.descent.adds_term:
            look.add_second_order(ascend)
            record.closure_calls += 1
            record.passes += share * cost.first
        self.late = look.finish()
        return loss

    @property
    def local(self) -> bool:
        """Whether this step climbs along a gradient that other ranks do not share."""
        return self.method.ranks.local and self.active and not self.method.one_pass

    def _warm_up(self, closure: Closure) -> None:
        """Run a pass that leaves no trace, where a wrapper wants one before it leaves sums out."""
        if not (self.local and self.method.ranks.cold()):
            return
        guard = self.guard
        guard.await_verdict(True)
        guard.enter_step()
        try:
            first_pass(closure)
            self.method.ranks.warmed()
        finally:
            guard.settle(False)
            guard.rewind(always=True)
            guard.leave_step()
            self.method.clear()
            guard.await_verdict(self.method.scaling.on)

    def _verdict(self, *, local: bool) -> AbstractContextManager[None]:
        """Let all ranks hear of an overflow in the first gradient of this one, so that they scale alike."""
        norm = self.record._norm
        if not (local and self.method.scaling.on) or norm is None:
            return nullcontext()
        return spoiled_unless(torch.isfinite(norm), self.method.params())

    def _first(self, look: Look, ascend: Closure) -> tuple[Loss, bool]:
        saves = self.active and not self.method.one_pass
        outputs = self.outputs.take() if self.outputs is not None and self.active else nullcontext()
        true = true_gradients() if saves else nullcontext()  # else the base optimizer may see this gradient
        with look.only_what_moves() if saves else nullcontext(False) as cheap, outputs, true:
            try:
                return first_pass(ascend), cheap
            except RuntimeError as error:
                if cheap and "does not require grad" in str(error):
                    raise RuntimeError(NOT_IN_THE_LOSS + str(error)) from error
                raise

    @staticmethod
    def _close(look: Look, *, ranked: bool) -> None:
        if ranked:
            look.undo()
        else:
            look.close()

    def accepts(self) -> bool:
        """Ask a schedule that decides by the gradient, with the first gradient in ``.grad``."""
        schedule = self.method.schedule
        if not schedule.needs_norm:
            return True
        norm = float(joint_gradient_norm(self.method.params()))
        groups = self.method.base.param_groups
        pending = ChainMap(self.method.memory.numbers, groups[0])  # counts once the update is made
        accepted = schedule.accepts(norm**2, self.record.step, pending)
        if not accepted:
            self.record._reason = "schedule"
        return accepted
