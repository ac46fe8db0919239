"""The doctor: is SAM on, is it the right size, and does the training go on under it?

Some 150 steps are taken on a copy of the model by a copy of the optimizer, and in turn on a second copy by the base
optimizer alone, on the same batches. Some of them are watched from outside (:mod:`flatwise.measure.probe`), the others
are timed. What is seen is judged in :mod:`flatwise.measure.verdicts`.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections import Counter
from typing import Any

import torch
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from flatwise.bsam import BSAM
from flatwise.errors import UserError
from flatwise.measure.diagnosis import BatchNormReport, Diagnosis
from flatwise.measure.probe import Look, Probe
from flatwise.measure.problem import LossFn, Mode, Problem
from flatwise.measure.progress import Bar
from flatwise.measure.twin import TrainStep, Twin, base_twin, generators_of, radius_of, some_batches, takes_radius
from flatwise.measure.unchanged import seed_all, unchanged
from flatwise.measure.verdicts import LOST, Evidence, judge, mean_of
from flatwise.optimizer import SAM
from flatwise.seeds import derive, stream
from flatwise.variants import variant_info

WATCHED = 30
"""Steps of which loss and gradient at both points are evaluated."""
ASIDE = 8
"""Batches that no step is taken on, by which the fall of the loss is judged."""


def doctor(
    model: Module,
    loss_fn: LossFn,
    data: Any,
    optimizer: Any,
    *,
    steps: int = 150,
    train_step: TrainStep | None = None,
    mode: Mode = "train",
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Say whether SAM is on, whether its radius is too small or too large, and what to change.

    Model, optimizer, gradients, buffers, random state and a DataLoader's generators are left as they were, bit for bit.
    The learning rate is that of the groups, in every step.

    Args:
        model: as it is trained.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch (for ``k-sam`` and ``esam-sds``, one loss
            for each sample).
        data: training batches; the first ``steps`` are used, and again from the start where there are fewer.
        optimizer: as it is used: of flatwise, of torch, or of another library with ``step(closure)`` or with
            ``first_step`` and ``second_step``. Its parameters are the model's.
        steps: how many to take.
        train_step: ``train_step(model, optimizer, batch)`` makes one step as your loop does. Without it the step is
            made in the way that fits the optimizer, and a mistake in your loop cannot be seen.
        mode: ``"train"``, or ``"as is"``, where parts of the model stay in evaluation mode.
        seed: of dropout masks and the choice of the watched steps.
        progress: show a bar where it takes long.

    Returns:
        The diagnosis; print it.

    Raises:
        UserError: bad arguments, or a model and an optimizer that cannot be copied.
    """
    if not isinstance(steps, int) or steps < 2:
        raise UserError(f"steps must be a whole number >= 2, got {steps!r}")
    model = model.module if isinstance(model, DistributedDataParallel) else model
    with generators_of(data), unchanged(model):
        batches = some_batches(data, steps + ASIDE)
        visit = _Visit(model, loss_fn, batches, optimizer, mode, seed, train_step)
        with Bar("doctor", steps, shown=progress) as bar, visit.problem.open(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "only .* of the perturbation arrives")  # the verdict says so
            visit.run(steps, bar)
        return visit.diagnosis(steps)


class _Visit:
    """The copies, and what was seen on them."""

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
        """Take the steps, of both copies in turn."""
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
        if watch:
            try:
                look = probe.watched(step, batch, seed, self.train_step)
            except Exception as error:
                if self.train_step is None:
                    raise
                self.raised = " ".join(str(error).split()) or type(error).__name__
                return False
            self.looks.append(look)
            self.curve.append((step, base_loss, look.loss))
        else:
            seed_all(seed)
            started = time.perf_counter()
            self.sam.step(self.loss_fn, batch, self.train_step)
            _wait(self.problem.device)
            self.ratios.append((time.perf_counter() - started) / base_seconds)
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

    def _made(self, perturbed: list[Look]) -> float:
        optimizer = self.sam.optimizer
        if isinstance(optimizer, SAM):
            ball = optimizer._ascent.ball
            one_norm = (
                ball.normalised and ball.scope == "all" and len({g.get("rho") for g in optimizer.param_groups}) == 1
            )
            pairs = [n / r for n, r in zip(self.norms, self.radii, strict=True) if r]
            return statistics.median(pairs) if pairs and one_norm else math.nan
        if isinstance(optimizer, BSAM) or not self.rho or self._adaptive():
            return math.nan
        return statistics.median(look.displacement / self.rho for look in perturbed) if perturbed else math.nan

    def _adaptive(self) -> bool:
        optimizer = self.sam.optimizer
        if isinstance(optimizer, SAM):
            return optimizer._ascent.ball.adaptive is True
        return any(bool(group.get("adaptive", False)) for group in optimizer.param_groups)

    def _ever_active(self) -> bool | None:
        optimizer = self.sam.optimizer
        if not isinstance(optimizer, SAM):
            return None
        schedule = optimizer._schedule
        length = schedule.total_steps or max(10_000, 2 * schedule.every + schedule.warmup_steps)
        return any(schedule.active(step) for step in range(length))

    def evidence(self) -> Evidence:
        """Collect what the verdict is judged by."""
        perturbed = [look for look in self.looks if look.displacement > 0]
        steps = sum(self.reasons.values())
        falls = [a - b for a, b in zip(self.before, self.after, strict=True)]
        base_falls = [a - b for a, b in zip(self.before, self.after_base, strict=False)]
        lags = [0.5 * b - s for s, b in zip(falls, base_falls, strict=False)]
        base_losses = [base for _, base, _ in self.curve if self.base is not None]
        seen = [look.loss for look in self.looks] + [look.perturbed_loss for look in perturbed] + self.after
        first = self.looks[0].loss if self.looks else 0.0
        return Evidence(
            family=self.family,
            rho=self.rho,
            adaptive=self._adaptive(),
            raised=self.raised,
            moved=len(perturbed) / max(1, len(self.looks)),
            claimed=self.reasons["perturbed"] / steps if steps else math.nan,
            reasons=tuple((name, n / steps) for name, n in self.reasons.items() if name != "perturbed"),
            ever_active=self._ever_active(),
            finite=all(map(math.isfinite, [first, *base_losses, *self.after_base])),
            finite_sam=all(map(math.isfinite, seen)),
            same=sum(look.same for look in perturbed) / max(1, len(perturbed)),
            left_behind=statistics.median(look.left_behind for look in perturbed) if perturbed else 0.0,
            made=self._made(perturbed),
            cosine=mean_of([cosine(look) for look in perturbed]),
            change=mean_of([look.difference / look.gradient_norm for look in perturbed if look.gradient_norm]),
            fall_base=mean_of(base_falls),
            fall_sam=mean_of(falls),
            lag=mean_of(lags),
            start=statistics.fmean(self.before),
            spread=_spread(self.before),
        )

    def diagnosis(self, steps: int) -> Diagnosis:
        """Judge, and put everything together."""
        seen = self.evidence()
        verdict = judge(seen)
        perturbed = [look for look in self.looks if look.displacement > 0]
        return Diagnosis(
            verdict=verdict.word,
            cause=verdict.cause,
            why=verdict.why,
            change=verdict.change,
            notes=tuple(self._notes(seen)),
            optimizer=_name(self.sam.optimizer),
            steps=self.done,
            watched=len(self.looks),
            rho=self.rho,
            loss=mean_of([look.loss for look in self.looks]),
            perturbed_loss=mean_of([look.perturbed_loss for look in perturbed]),
            gap=mean_of([look.perturbed_loss - look.loss for look in perturbed]),
            cosine=seen.cosine,
            gradient_change=seen.change,
            perturbation=mean_of([look.displacement for look in perturbed]),
            made=seen.made,
            active=seen.claimed if self.own else seen.moved,
            passes=statistics.fmean(self.passes) if self.passes else math.nan,
            time_ratio=statistics.median(self.ratios) if self.base is not None and self.ratios else math.nan,
            batch_norm=self._batch_norm(),
            curve=tuple(self.curve),
            fall_base=seen.fall_base,
            fall_sam=seen.fall_sam,
            conditions=self.problem.conditions(),
            cost=self.problem.cost(),
        )

    def _batch_norm(self) -> BatchNormReport | None:
        errors = [look.statistics_error for look in self.looks if not math.isnan(look.statistics_error)]
        if not errors:
            return None
        counted = [look.counted for look in self.looks if not math.isnan(look.counted)]
        return BatchNormReport(
            statistics.median(errors),
            statistics.median(counted) if counted else math.nan,
            mean_of([look.statistics_shift for look in self.looks]).value,
        )

    def _notes(self, seen: Evidence) -> list[str]:
        notes = []
        report = self._batch_norm()
        if report is not None and (report.counted > 1.5 or report.statistics_error > 0.5):
            notes.append(
                "batch normalisation is updated more than once in a step, the last time with the statistics at w + "
                "eps: flatwise.SAM keeps those of one pass at w"
            )
        usual = variant_info("asam").rho_range[0]
        if seen.adaptive and self.rho and self.rho < usual:
            notes.append(
                f"rho = {self.rho:g} with an adaptive ball is below the usual {usual:g} to 5: a radius of SAM was "
                "probably carried over. An adaptive ball is scaled by |w|"
            )
        if abs(math.log(max(seen.made, LOST / 10))) > 0.1:  # False for NaN
            notes.append(f"rounding made the perturbation {seen.made:.2g} times as long as was asked for")
        gap = mean_of([look.perturbed_loss - look.loss for look in self.looks])
        if gap.below(0.0):
            notes.append("the loss at w + eps is lower than at w: what is climbed along does not lead up")
        if not any(float(group.get("lr", 1.0)) for group in self.sam.optimizer.param_groups):
            notes.append("the learning rate is 0 in every group: nothing can be said about the training")
        elif self.base is not None and not seen.fall_base.above(0.0):
            notes.append("the loss does not fall with the base optimizer either: what SAM does to it cannot be judged")
        if self.done and len(self.batches) < self.done:
            notes.append(f"{self.done} steps were taken on {len(self.batches)} batches: each was seen more than once")
        return notes


def cosine(look: Look) -> float:
    """Compute the cosine between the two gradients of a step.

    Args:
        look: a step that was perturbed.

    Returns:
        In [-1, 1]; NaN where a gradient is zero.
    """
    lengths = look.gradient_norm * look.perturbed_gradient_norm
    return look.product / lengths if lengths > 0 else math.nan


def _spread(values: list[float]) -> float:
    mean = statistics.fmean(values)
    return math.sqrt(statistics.fmean((value - mean) ** 2 for value in values))


def _name(optimizer: Any) -> str:
    base = getattr(optimizer, "base_optimizer", None)
    name = type(optimizer).__name__
    return name if base is None else f"{name} around {type(base).__name__}"


def _wait(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device.type).synchronize(device)
