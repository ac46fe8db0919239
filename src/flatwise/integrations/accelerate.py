"""Hugging Face Accelerate: the second pass inside ``accelerator.accumulate()``.

``AcceleratedOptimizer.step(closure)`` runs no closure on the steps between two updates, and does not return its loss.
So the loop stays the usual one, and only ``accelerator.backward(loss)`` is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flatwise.integrations.replay import Replay, climbing_together
from flatwise.record import StepRecord

NO_SAM = """found no flatwise.SAM in the optimizer. Wrap the plain optimizer, before it is prepared:
    optimizer = flatwise.SAM(torch.optim.AdamW(model.parameters(), lr=1e-3), rho=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = SAMStep(accelerator, model, optimizer)"""

CLOSURE = """optimizer.step(closure) beside SAMStep: under accelerator.accumulate() the closure would not run between \
two updates. Call step.backward(loss_fn, batch), and then optimizer.step() without a closure"""


def refuse_engine(accelerator: Any) -> None:
    """Refuse what owns the weights and the optimizer's step.

    Args:
        accelerator: the ``accelerate.Accelerator``.

    Raises:
        ValueError: if it runs DeepSpeed or Megatron-LM.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"SAM cannot run under {kind}: its engine owns and partitions the optimizer, so nobody else can move the "
            "weights between two passes. Use FSDP2 (fully sharded) or DDP instead"
        )


def _refuse_closure(_: Any, arguments: tuple[Any, ...], __: Any) -> None:
    if any(argument is not None for argument in arguments):
        raise RuntimeError(CLOSURE)


class SAMStep:
    """Runs the micro-batches of a step, and after the last one all of them again, at w + eps.

    Args:
        accelerator: the ``accelerate.Accelerator``.
        model: as ``accelerator.prepare`` returned it.
        optimizer: as ``accelerator.prepare`` returned it, with a :class:`flatwise.SAM` inside; a TypeError says so if
            there is none. A ValueError says that ranks cannot climb apart here, or that DeepSpeed or Megatron-LM runs.
    """

    def __init__(self, accelerator: Any, model: Any, optimizer: Any) -> None:
        refuse_engine(accelerator)
        sam = climbing_together(optimizer, NO_SAM)
        self._accelerator, self._model, self._sam = accelerator, model, sam
        self._replay = Replay()
        self._losses: list[Tensor] = []
        self._perturbed: list[Tensor] = []
        self.second_pass = False
        """Whether the model is being run at w + eps: what ``loss_fn`` counts, it counts where this is False."""
        sam.attach_scaler(accelerator.scaler)
        sam._guard.know(model)
        if _refuse_closure not in sam._optimizer_step_pre_hooks.values():
            sam.register_step_pre_hook(_refuse_closure)

    @property
    def last(self) -> StepRecord:
        """What the latest step did, with the losses of this rank."""
        return self._sam.last

    def backward(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Do what ``accelerator.backward(loss_fn(batch))`` does, and the second pass where a step is due.

        Args:
            loss_fn: ``loss_fn(batch)`` returns the mean loss; it runs again in the second pass.
            batch: a micro-batch.

        Returns:
            The loss at w, detached.
        """

        def part() -> Tensor:
            loss = loss_fn(batch)
            if not isinstance(loss, Tensor):
                raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
            self._accelerator.backward(loss)
            return loss.detach()

        return self.run(part)

    def run(self, part: Callable[[], Tensor]) -> Tensor:
        """Run a micro-batch; after the last one of a step, run all of them again at w + eps.

        Args:
            part: forward and backward with its share of the loss, without clearing gradients; returns the loss.

        Returns:
            The loss at w, as ``part`` returned it.

        Raises:
            BaseException: what ``part`` raised; the weights are at w.
        """
        if not self._sam._method.has_gradients():  # a new step, or a loop that gave up the micro-batches before
            self._replay.clear()
            self._losses = []
        self._replay.add(self._sam, lambda: self._perturbed.append(part()))
        try:
            loss = part()
        except BaseException:
            self._replay.forget_last()  # the gradients of those before it are still there, and so are they
            raise
        self._losses.append(loss)
        if self._accelerator.sync_gradients:
            self._second_pass()
        return loss

    def _second_pass(self) -> None:
        losses, self._losses, self._perturbed = self._losses, [], []
        self.second_pass = True
        try:
            moved = self._replay.second_pass(self._sam, self._apart)
        finally:
            self.second_pass = False
        # Tensors, divided as accelerator.backward() divides: nothing waits for a device until the record is read.
        share = 1 / self._accelerator.gradient_accumulation_steps
        self.last._loss = torch.stack(losses).sum() * share
        if moved:
            self.last._perturbed_loss = torch.stack(self._perturbed).sum() * share

    def _apart(self) -> AbstractContextManager[Any]:
        """Sum gradients over ranks with the last micro-batch only, unless all are to be summed, which saves memory."""
        if self._accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self._model)
        return context
