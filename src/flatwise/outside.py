"""Second passes that happen outside flatwise: two calls, a ``with`` block, and what frameworks build on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flatwise.eager import eagerly
from flatwise.look import Look
from flatwise.norms import all_finite
from flatwise.stepping import Stepping
from flatwise.update import spoil_unless


class Outside(Stepping):
    """An optimizer that is at w + eps while somebody else runs the second pass."""

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
            try:
                self._restore(finish=finished)
            finally:
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
            if finish:
                look.compare()
            if finish and last:
                self._spoil_where_bad()
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
        self._spoil_where_bad(everywhere=True)
        if self._scaling.on and self._late:  # and so must one in what is added after the step
            finite = torch.as_tensor(all_finite([difference for _, difference in self._late]))
            spoil_unless(finite, [p.grad for p in params if p.grad is not None])

    def _spoil_where_bad(self, *, everywhere: bool = False) -> None:
        """Let the scaler, which sees the last gradient, see an infinity in the first one too.

        On the CPU, and where gradients are those of all ranks, that shows itself: nothing was perturbed.
        """
        norm = self.last._norm
        local = self._method.ranks.local and not self._method.one_pass
        if self._scaling.on and norm is not None and (local or (everywhere and not norm.is_cpu)):
            spoil_unless(torch.isfinite(norm), [p.grad for p in self._method.params() if p.grad is not None])

    @eagerly
    def _open(self, name: str, *, always: bool) -> bool:
        """Begin a second pass that happens outside flatwise."""
        if "base_optimizer" not in vars(self):
            raise RuntimeError(f"{name} was called on a framework's wrapper: call opt.optimizer.{name}")
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
        if one_pass and self._auto is not None:
            raise RuntimeError(
                f"{name} runs one pass of a method that needs one, and rho='auto' must see both in some steps: "
                "use opt.step(closure) or opt.step(loss_fn, batch), or give rho a number"
            )
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
            # Where gradients are a rank's own, one rank must not leave out a pass that the others make; and where no
            # rank looks around, it is this pass that sums them.
            always = always or local
            if local:
                self._method.ranks.share(self._method.params())
        record.passes = 1.0 + (always and not one_pass)
        look = self._new_look(record)
        moved = False
        self._look = look
        try:
            moved = active and look.displace()
            if local and active and self._scaling.on:
                record._norm = self._method.ranks.agreed(record._norm, self._method.params()[0].device)
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
        return moved or local
