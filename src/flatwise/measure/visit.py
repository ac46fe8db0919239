"""The doctor's steps: two copies side by side, one with SAM and one with the base, watched and timed."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch.nn import Module

from flatwise.bsam import BSAM
from flatwise.measure.probe import Look, Probe
from flatwise.measure.problem import LossFn, Mode, Problem
from flatwise.measure.progress import Bar
from flatwise.measure.twin import TrainStep, Twin, base_twin, radius_of, takes_radius
from flatwise.measure.unchanged import seed_all
from flatwise.optimizer import SAM
from flatwise.seeds import derive, stream

WATCHED = 30
"""Steps of which loss and gradient at both points are evaluated."""
ASIDE = 8
"""Batches that no step is taken on, by which the fall of the loss is judged."""


class Visit:
    """The copies, and what was seen on them.

    Args:
        model: the user's.
        loss_fn: the mean loss of a batch.
        batches: what there is to train and to look on.
        optimizer: the user's.
        mode: of the model.
        seed: of what is drawn.
        train_step: the user's own way to make a step.
    """

    def __init__(
        self,
        model: Module,
        loss_fn: LossFn,
        batches: list[Any],
        optimizer: Any,
        mode: Mode,
        seed: int,
        train_step: TrainStep | None,
    ) -> None:
        self.loss_fn, self.seed, self.train_step = loss_fn, seed, train_step
        self.sam, self.base = Twin(model, optimizer), base_twin(model, optimizer)
        self.problem = Problem(self.sam.model, loss_fn, iter(batches), mode=mode, seed=seed)
        batches = [self.problem._placed(batch) for batch in self.problem.batches]
        aside = min(ASIDE, len(batches) // 4)
        self.batches, self.aside = batches[: len(batches) - aside], batches[len(batches) - aside :] or batches
        self.family = takes_radius(optimizer)
        self.rho = radius_of(optimizer)
        self.own = isinstance(self.sam.optimizer, SAM | BSAM)
        self.looks: list[Look] = []
        self.curve: list[tuple[int, float, float]] = []
        self.reasons: Counter[str] = Counter()
        self.passes: list[float] = []
        self.norms: list[float] = []
        self.ratios: list[float] = []
        self.radii: list[float] = []
        self.raised: str | None = None
        self.done = 0

    def run(self, steps: int, bar: Bar) -> None:
        """Take the steps, of both copies in turn.

        Args:
            steps: how many.
            bar: is told of each.
        """
        for twin in filter(None, (self.sam, self.base)):
            for module, like in zip(twin.model.modules(), self.sam.model.modules(), strict=True):
                module.training = like.training
        chosen = torch.randperm(steps, generator=stream(self.seed, "watched"))[:WATCHED].tolist()
        watched = {0, *chosen}
        probe, other = Probe(self.sam, self.loss_fn), Probe(self.base, self.loss_fn) if self.base else None
        self.before = probe.losses(self.aside, derive(self.seed, "aside") % 2**31)
        for step in range(steps):
            batch, seed = self.batches[step % len(self.batches)], derive(self.seed, "step", step) % 2**32
            base_loss, base_seconds = self._base_step(batch, seed)
            if not self._sam_step(probe, step, batch, seed, step in watched, base_loss, base_seconds):
                break
            self.done = step + 1
            bar.advance()
        self.after = probe.losses(self.aside, derive(self.seed, "aside") % 2**31)
        self.after_base = other.losses(self.aside, derive(self.seed, "aside") % 2**31) if other else []
        evaluations = probe.evaluations + (other.evaluations + self.done if other else 0) + sum(self.passes)
        self.problem.gradient_evaluations += evaluations / len(self.problem.batches)

    def _base_step(self, batch: Any, seed: int) -> tuple[float, float]:
        if self.base is None:
            return math.nan, math.nan
        twin = self.base
        seed_all(seed)
        started = time.perf_counter()
        twin.zero_grad()
        loss = self.loss_fn(twin.model, batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        twin.optimizer.step()
        _wait(self.problem.device)
        return float(loss.detach()), time.perf_counter() - started

    def _sam_step(
        self, probe: Probe, step: int, batch: Any, seed: int, watch: bool, base_loss: float, base_seconds: float
    ) -> bool:
        """Take a step; return whether to go on."""
        try:
            if watch:
                look = probe.watched(step, batch, seed, self.train_step)
                self.looks.append(look)
                self.curve.append((step, base_loss, look.loss))
            else:
                seed_all(seed)
                started = time.perf_counter()
                self.sam.step(self.loss_fn, batch, self.train_step)
                _wait(self.problem.device)
                self.ratios.append((time.perf_counter() - started) / base_seconds)
        except Exception as error:
            if self.train_step is None:
                raise
            text = " ".join(str(error).split())
            self.raised = f"{type(error).__name__}{text and f': {text}'} (in step {step + 1})"
            return False
        if self.own:
            last = self.sam.optimizer.last
            self.reasons[last.reason] += 1
            self.passes.append(last.passes)
            if last.active:
                self.norms.append(last.perturbation_norm)
                self.radii.append(last.rho)
        elif watch:
            self.passes.append(self.looks[-1].passes)
        return True

    def made(self, perturbed: list[Look]) -> float:
        """Compare the perturbation's norm with the radius, in the norm that the radius is meant in.

        Args:
            perturbed: the watched steps that were perturbed.

        Returns:
            The median of their ratio; NaN where the radius is no norm, or not of one ball.
        """
        optimizer = self.sam.optimizer
        if isinstance(optimizer, SAM):
            ball = optimizer._ascent.ball
            one_norm = (
                ball.normalised and ball.scope == "all" and len({g.get("rho") for g in optimizer.param_groups}) == 1
            )
            pairs = [n / r for n, r in zip(self.norms, self.radii, strict=True) if r]
            return statistics.median(pairs) if pairs and one_norm else math.nan
        if isinstance(optimizer, BSAM) or not self.rho or self.adaptive():
            return math.nan
        return statistics.median(look.displacement / self.rho for look in perturbed) if perturbed else math.nan

    def adaptive(self) -> bool:
        """Tell whether the ball is scaled by the weights."""
        optimizer = self.sam.optimizer
        if isinstance(optimizer, SAM):
            return optimizer._ascent.ball.adaptive is True
        return any(bool(group.get("adaptive", False)) for group in optimizer.param_groups)

    def ever_active(self) -> bool | None:
        """Tell whether the schedule perturbs any step of the training; None where it is not known."""
        optimizer = self.sam.optimizer
        if not isinstance(optimizer, SAM):
            return None
        schedule = optimizer._schedule
        length = schedule.total_steps or max(10_000, 2 * schedule.every + schedule.warmup_steps)
        return any(schedule.active(step) for step in range(length))


def _wait(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device.type).synchronize(device)
