"""What a step does, seen from outside: at which weights the loss was computed, and what holds there.

Nothing that an optimizer says about itself is needed. A watched step keeps the weights at which its passes were made;
afterwards loss and gradient are evaluated at the weights before the step and at the last ones that it visited, on the
same batch, with the same dropout masks, and every buffer is put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from flatwise.batching import count
from flatwise.measure.twin import LossFn, TrainStep, Twin
from flatwise.measure.unchanged import Displaced, seed_all

ROUNDING = 1e-6
"""Relative difference of two gradients that the order of summation alone can make in float32."""


@dataclass(frozen=True)
class Look:
    """What one watched step did.

    Attributes:
        step: its number.
        loss: at w.
        perturbed_loss: at w + eps; NaN where nothing was perturbed.
        gradient_norm: L2, at w.
        perturbed_gradient_norm: L2, at w + eps.
        product: of both gradients.
        difference: L2 norm of their difference.
        displacement: L2 norm of eps; 0 where every pass was made at w.
        same: whether both gradients are equal up to rounding.
        left_behind: share of eps that is still in the weights after the step.
        passes: gradients that the step computed, in units of the batch.
        statistics_error: how far the running statistics after the step are from those of one pass at w, in units of
            that pass's change; NaN without batch normalisation.
        counted: by how much the step raised ``num_batches_tracked``; NaN without batch normalisation.
        statistics_shift: distance between the batch means at w and at w + eps in standard deviations (median over
            channels); NaN without batch normalisation.
    """

    step: int
    loss: float
    perturbed_loss: float
    gradient_norm: float
    perturbed_gradient_norm: float
    product: float
    difference: float
    displacement: float
    same: bool
    left_behind: float
    passes: float
    statistics_error: float
    counted: float
    statistics_shift: float


class Probe:
    """Evaluates a loss on a twin without leaving a trace in its buffers.

    Args:
        twin: the model and its optimizer.
        loss_fn: the mean loss of a batch.
    """

    def __init__(self, twin: Twin, loss_fn: LossFn) -> None:
        self.twin, self._loss_fn = twin, loss_fn
        self.evaluations = 0.0
        self._norms = [m for m in twin.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Put back buffers. Random state needs no care: whatever draws is seeded first.

        Yields:
            Nothing.
        """
        buffers = [b for b in self.twin.model.buffers() if b is not None]
        copies = [b.clone() for b in buffers]
        try:
            yield
        finally:
            with torch.no_grad():
                for b, kept in zip(buffers, copies, strict=True):
                    b.copy_(kept)

    def gradient(self, batch: Any, seed: int) -> tuple[float, list[Tensor]]:
        """Evaluate loss and gradient where the weights are; buffers move as the model moves them.

        Args:
            batch: the batch.
            seed: of what the loss draws.

        Returns:
            The loss, and a gradient for each trainable parameter.
        """
        seed_all(seed)
        self.evaluations += 1
        with torch.enable_grad():
            loss = self._loss_fn(self.twin.model, batch).mean()
        if not loss.requires_grad:
            return float(loss.detach()), [torch.zeros_like(p) for p in self.twin.params]
        grads = torch.autograd.grad(loss, self.twin.params, allow_unused=True)
        return float(loss.detach()), [
            torch.zeros_like(p) if g is None else g.detach() for g, p in zip(grads, self.twin.params, strict=True)
        ]

    def losses(self, batches: Sequence[Any], seed: int) -> list[float]:
        """Evaluate the loss of batches, without a trace.

        Args:
            batches: the batches.
            seed: of what the loss draws.

        Returns:
            One number for each.
        """
        self.evaluations += len(batches) / 3
        values = []
        with self.untouched(), torch.no_grad():
            for number, batch in enumerate(batches):
                seed_all(seed + number)
                values.append(float(self._loss_fn(self.twin.model, batch).mean()))
        return values

    def watched(self, step: int, batch: Any, seed: int, train_step: TrainStep | None) -> Look:
        """Take a step, and say what it did.

        Args:
            step: its number.
            batch: the batch.
            seed: of what the loss draws.
            train_step: the user's own way to make a step.

        Returns:
            What it did.
        """
        twin = self.twin
        before, start = self._statistics(), [p.detach().clone() for p in twin.params]
        with self.untouched():
            loss, clean = self.gradient(batch, seed)
            one_pass = self._statistics()
        visits = self._step(batch, start, seed, train_step)
        after, end = self._statistics(), [p.detach().clone() for p in twin.params]
        away = [weights for weights, _ in visits if weights is not None]
        perturbed_loss, other, displacement, left, shift = math.nan, clean, 0.0, 0.0, math.nan
        if away:
            eps = [w - s for w, s in zip(away[-1], start, strict=True)]
            displacement = norm(eps)
            left = dot([e - s for e, s in zip(end, start, strict=True)], eps) / displacement**2
            with Displaced(twin.params) as displaced, self.untouched():
                _restore(self._norms, before)
                displaced.place(away[-1])
                perturbed_loss, other = self.gradient(batch, seed)
                shift = self._shift(one_pass, self._statistics())
        difference = [b - a for a, b in zip(clean, other, strict=True)]
        largest = max((float(g.abs().max()) for g in clean if g.numel()), default=0.0)
        # A perturbation too short for float32 to see changes no gradient either, which is another matter.
        visible = displacement > 1e-5 * norm(start)
        return Look(
            step=step,
            loss=loss,
            perturbed_loss=perturbed_loss,
            gradient_norm=norm(clean),
            perturbed_gradient_norm=norm(other) if away else math.nan,
            product=dot(clean, other) if away else math.nan,
            difference=norm(difference) if away else math.nan,
            displacement=displacement,
            same=visible and all(float(d.abs().max()) <= ROUNDING * largest for d in difference if d.numel()),
            left_behind=left,
            passes=sum(share for _, share in visits),
            statistics_error=_relative(before, one_pass, after),
            counted=_counted(self._norms, before, after),
            statistics_shift=shift,
        )

    def _step(
        self, batch: Any, start: list[Tensor], seed: int, train_step: TrainStep | None
    ) -> list[tuple[list[Tensor] | None, float]]:
        """Take the step; return the weights of each pass (None: those before the step) and its share of the batch."""
        twin, whole = self.twin, _samples(batch)
        visits: list[tuple[list[Tensor] | None, float]] = []

        def visit(share: float) -> None:
            if not torch.is_grad_enabled():
                return
            moved = any(not torch.equal(p, s) for p, s in zip(twin.params, start, strict=True))
            visits.append(([p.detach().clone() for p in twin.params] if moved else None, share))

        def seen(model: Module, part: Any) -> Tensor:
            visit(_samples(part) / whole)
            return self._loss_fn(model, part)

        seed_all(seed)
        if train_step is None:
            twin.step(seen, batch)
            return visits
        handle = twin.model.register_forward_pre_hook(lambda *_: visit(1.0))
        try:
            twin.step(self._loss_fn, batch, train_step)
        finally:
            handle.remove()
        return visits

    def _statistics(self) -> list[Tensor]:
        return [
            b.detach().double().clone()
            for m in self._norms
            for b in (m.running_mean, m.running_var, m.num_batches_tracked)
            if b is not None
        ]

    def _shift(self, here: list[Tensor], there: list[Tensor]) -> float:
        shifts = []
        place = 0
        for m in self._norms:
            mean, other, var = here[place], there[place], here[place + 1]
            # A running mean without momentum is the average of all batches so far.
            momentum = (1 / float(here[place + 2])) if m.momentum is None else m.momentum
            shifts.append((mean - other).abs() / momentum / (var + m.eps).sqrt())
            place += 2 if m.num_batches_tracked is None else 3
        return float(torch.cat(shifts).median()) if shifts else math.nan


def _restore(norms: list[_BatchNorm], statistics: list[Tensor]) -> None:
    values = iter(statistics)
    with torch.no_grad():
        for m in norms:
            for b in (m.running_mean, m.running_var, m.num_batches_tracked):
                if b is not None:
                    b.copy_(next(values))


def _relative(before: list[Tensor], one_pass: list[Tensor], after: list[Tensor]) -> float:
    change = norm([a - b for a, b in zip(one_pass, before, strict=True) if a.dim()])
    return norm([a - b for a, b in zip(after, one_pass, strict=True) if a.dim()]) / change if change else math.nan


def _counted(norms: list[_BatchNorm], before: list[Tensor], after: list[Tensor]) -> float:
    rises = [float(a - b) for a, b in zip(after, before, strict=True) if not a.dim()]
    return max(rises) if rises else math.nan


def _samples(batch: Any) -> float:
    try:
        return float(count(batch))
    except ValueError:
        return 1.0


def norm(tensors: Sequence[Tensor]) -> float:
    """Compute the joint L2 norm in float64.

    Args:
        tensors: any shapes.

    Returns:
        The norm; 0 for none.
    """
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


def dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Compute the joint inner product in float64.

    Args:
        first: any shapes.
        second: the same shapes.

    Returns:
        The product.
    """
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(first, second, strict=True))
