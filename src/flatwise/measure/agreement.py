"""What a radius does to the direction of a step: does it still lead down on samples that it has not seen?

A method hands its base optimizer a direction d_i(rho), made from batch i. To first order, a step of length s against it
lowers the loss of the other batches by ``s A_i(rho)``:

    A_i(rho) = <mean of g_j over j != i, d_i(rho)> / ||d_i(rho)||

where g_j are the gradients at w. ``A_i(0)`` is what the base's own direction does. Beside it stands the cosine between
g_i and d_i(rho): whether the batch's own gradient is still to be seen in it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatwise.measure.means import Mean, mean_of
from flatwise.measure.probe import Probe, dot, norm
from flatwise.measure.twin import LossFn, Twin
from flatwise.measure.unchanged import seed_all
from flatwise.optimizer import SAM
from flatwise.schedule import Schedule
from flatwise.seeds import derive

TINY = 1e-6
"""The radius, as a share of the method's own, under which a method that remembers gradients collects them."""


@dataclass(frozen=True)
class Reading:
    """What was found at one radius.

    Attributes:
        rho: the radius.
        agreement: mean of ``A_i(rho)`` over the mean of ``A_i(0)``.
        margin: ``A_i(rho) - (1 - loss) A_i(0)`` for the loss that is borne, over the mean length of ``A_i(0)``; the
            radius costs too much where it is below 0.
        cosine: between ``g_i`` and ``d_i(rho)``.
        harmless: whether both bounds hold.
    """

    rho: float
    agreement: float
    margin: Mean
    cosine: Mean
    harmless: bool


class Agreement:
    """Measures directions at one place, to which a copy was trained.

    Args:
        twin: a copy with a :class:`flatwise.SAM`, whose schedule is put aside: every step is perturbed.
        loss_fn: the mean loss of a batch.
        borne: share of ``A(0)`` that may be lost.
        least_cosine: how much of the own gradient must remain.
        seed: of what the loss draws.
    """

    def __init__(self, twin: Twin, loss_fn: LossFn, *, borne: float, least_cosine: float, seed: int) -> None:
        optimizer = twin.optimizer
        assert isinstance(optimizer, SAM)
        optimizer._schedule = optimizer._method.schedule = Schedule()
        optimizer._rho_function = None
        self._twin, self._optimizer, self._loss_fn, self._seed = twin, optimizer, loss_fn, seed
        self._borne, self._least_cosine = borne, least_cosine
        self._probe = Probe(twin, loss_fn)
        groups = optimizer.param_groups
        radii = [float(group[optimizer._rho_key]) for group in groups]
        self._shares = [radius / max(radii) if max(radii) else 1.0 for radius in radii]
        self.spent = 0.0
        self._seen: list[Tensor] = []
        optimizer.base_optimizer.register_step_pre_hook(self._see)
        # In these forms the first pass of a step is at w, where the gradient is known already.
        descent, batching = optimizer._descent, optimizer._batching
        self.repeats = batching.splits or descent.adds_term or descent.needs_output
        self.remembers = bool(optimizer._ascent.direction.remembers or descent.remembers)

    @property
    def passes(self) -> int:
        """Gradients in a whole step of the method."""
        method = self._optimizer
        extra = int(method._descent.adds_term)
        return 1 + method._ascent.steps + extra

    @property
    def price(self) -> int:
        """Gradients that one direction costs here."""
        return self.passes if self.repeats else self.passes - 1

    @property
    def warm_price(self) -> int:
        """Gradients that one step on the way costs here."""
        return self.passes if self.remembers else 1

    def train(self, batches: Sequence[Any], steps: int) -> None:
        """Train the copy with the base alone, or, where the method remembers gradients, with next to no radius.

        Args:
            batches: used in turn.
            steps: how many.
        """
        twin = self._twin
        self._place(TINY * max(float(group[self._optimizer._rho_key]) for group in self._optimizer.param_groups))
        for step in range(steps):
            batch = batches[step % len(batches)]
            seed_all(derive(self._seed, "train", step) % 2**32)
            if self.remembers:
                twin.step(self._loss_fn, batch)
            else:
                twin.zero_grad()
                self._loss_fn(twin.model, batch).mean().backward()  # type: ignore[no-untyped-call]
                self._optimizer.base_optimizer.step()
            self.spent += self.warm_price

    def stand(self, batches: Sequence[Any]) -> None:
        """Stay here, and take the gradients of the batches that are looked at.

        Args:
            batches: at least two.
        """
        self._batches = list(batches)
        self._weights = [p.detach().clone() for p in self._twin.params]
        self._state = copy.deepcopy(self._optimizer.state_dict())
        self._losses, self._gradients = [], []
        for number, batch in enumerate(self._batches):
            with self._probe.untouched():
                loss, gradient = self._probe.gradient(batch, self._draw(number))
            self._losses.append(loss)
            self._gradients.append(gradient)
        self.spent += len(self._batches)
        self._sum = [sum(g) for g in zip(*self._gradients, strict=True)]
        self.own = [self._leads_down(i, self._gradients[i]) for i in range(len(self._batches))]

    @property
    def base(self) -> Mean:
        """The mean of ``A_i(0)``."""
        return mean_of(self.own)

    def read(self, rho: float) -> Reading:
        """Measure a radius.

        Args:
            rho: the radius.

        Returns:
            What was found.
        """
        agreements, cosines = [], []
        for number in range(len(self._batches)):
            direction = self._direction(number, rho)
            own = self._gradients[number]
            lengths = norm(own) * norm(direction)
            finite = math.isfinite(lengths) and lengths > 0
            agreements.append(self._leads_down(number, direction) if finite else math.nan)
            cosines.append(dot(own, direction) / lengths if finite else math.nan)
        self.spent += self.price * len(self._batches)
        bad = any(map(math.isnan, agreements))
        base, size = self.base.value, sum(map(abs, self.own)) / len(self.own) or 1.0
        margins = [(a - (1 - self._borne) * b) / size for a, b in zip(agreements, self.own, strict=True)]
        margin, cosine = mean_of(margins), mean_of(cosines)
        agreement = math.nan if bad or not base else mean_of(agreements).value / base
        harmless = not bad and margin.value >= 0 and cosine.value >= self._least_cosine
        return Reading(rho, agreement, margin, cosine, harmless)

    def _leads_down(self, number: int, direction: list[Tensor]) -> float:
        rest = [s - g for s, g in zip(self._sum, self._gradients[number], strict=True)]
        return dot(rest, direction) / (len(self._batches) - 1) / max(norm(direction), 1e-300)

    def _draw(self, number: int) -> int:
        return derive(self._seed, "look", number) % 2**32

    def _place(self, rho: float) -> None:
        for group, share in zip(self._optimizer.param_groups, self._shares, strict=True):
            group[self._optimizer._rho_key] = rho * share

    def _see(self, *_: Any) -> None:
        self._seen = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self._twin.params]

    def _direction(self, number: int, rho: float) -> list[Tensor]:
        """Take a step of the method, see what its base is given, and take everything back."""
        twin, optimizer, batch = self._twin, self._optimizer, self._batches[number]
        self._place(rho)
        twin.zero_grad()
        known = not self.repeats

        def closure() -> Tensor:
            nonlocal known
            twin.zero_grad()
            if known:
                known = False
                for p, g in zip(twin.params, self._gradients[number], strict=True):
                    p.grad = g.clone() if p.requires_grad else None
                return torch.tensor(self._losses[number])
            seed_all(self._draw(number))
            loss = self._loss_fn(twin.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with self._probe.untouched():
            seed_all(self._draw(number))
            if self.repeats:
                twin.step(self._loss_fn, batch)
            else:
                optimizer.step(closure)
        direction = self._seen
        if optimizer._descent.adds_late:  # a part of the direction goes around the base: it is in the update alone
            direction = [w - p.detach() for w, p in zip(self._weights, twin.params, strict=True)]
        with torch.no_grad():
            for p, w in zip(twin.params, self._weights, strict=True):
                p.copy_(w)
        optimizer.load_state_dict(self._state)
        return direction
