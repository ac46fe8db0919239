"""The doctor: is SAM on, is it the right size, and does the training go on under it?

Some 150 steps are taken on a copy of the model by a copy of the optimizer, and in turn on a second copy by the base
optimizer alone, on the same batches. Some of them are watched from outside (:mod:`flatwise.measure.probe`), the others
are timed. What is seen is judged in :mod:`flatwise.measure.verdicts`.
"""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from flatwise.errors import UserError
from flatwise.measure.diagnosis import BatchNormReport, Diagnosis
from flatwise.measure.means import mean_of
from flatwise.measure.probe import Look
from flatwise.measure.problem import LossFn, Mode
from flatwise.measure.progress import Bar
from flatwise.measure.twin import TrainStep, generators_of, some_batches
from flatwise.measure.unchanged import unchanged
from flatwise.measure.verdicts import LOST, Evidence, judge
from flatwise.measure.visit import ASIDE, Visit
from flatwise.variants import variant_info


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
        visit = Visit(model, loss_fn, batches, optimizer, mode, seed, train_step)
        with Bar("doctor", steps, shown=progress) as bar, visit.problem.open(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "only .* of the perturbation arrives")  # the verdict says so
            visit.run(steps, bar)
        return diagnosis_of(visit)


def evidence_of(visit: Visit) -> Evidence:
    """Collect what the verdict is judged by.

    Args:
        visit: after its steps.

    Returns:
        The evidence.
    """
    perturbed = [look for look in visit.looks if look.displacement > 0]
    steps = sum(visit.reasons.values())
    falls = [a - b for a, b in zip(visit.before, visit.after, strict=True)]
    base_falls = [a - b for a, b in zip(visit.before, visit.after_base, strict=False)]
    lags = [0.5 * b - s for s, b in zip(falls, base_falls, strict=False)]
    base_losses = [base for _, base, _ in visit.curve if visit.base is not None]
    seen = [look.loss for look in visit.looks] + [look.perturbed_loss for look in perturbed] + visit.after
    first = visit.looks[0].loss if visit.looks else 0.0
    return Evidence(
        family=visit.family,
        rho=visit.rho,
        adaptive=visit.adaptive(),
        raised=visit.raised,
        moved=len(perturbed) / max(1, len(visit.looks)),
        claimed=visit.reasons["perturbed"] / steps if steps else math.nan,
        reasons=tuple((name, n / steps) for name, n in visit.reasons.items() if name != "perturbed"),
        ever_active=visit.ever_active(),
        finite=all(map(math.isfinite, [first, *base_losses, *visit.after_base])),
        finite_sam=all(map(math.isfinite, seen)),
        same=sum(look.same for look in perturbed) / max(1, len(perturbed)),
        left_behind=statistics.median(look.left_behind for look in perturbed) if perturbed else 0.0,
        made=visit.made(perturbed),
        cosine=mean_of([cosine(look) for look in perturbed]),
        change=mean_of([look.difference / look.gradient_norm for look in perturbed if look.gradient_norm]),
        fall_base=mean_of(base_falls),
        fall_sam=mean_of(falls),
        lag=mean_of(lags),
        start=statistics.fmean(visit.before),
        spread=_spread(visit.before),
    )


def diagnosis_of(visit: Visit) -> Diagnosis:
    """Judge, and put everything together.

    Args:
        visit: after its steps.

    Returns:
        The diagnosis.
    """
    seen = evidence_of(visit)
    verdict = judge(seen)
    perturbed = [look for look in visit.looks if look.displacement > 0]
    return Diagnosis(
        verdict=verdict.word,
        cause=verdict.cause,
        why=verdict.why,
        change=verdict.change,
        notes=tuple(_notes(visit, seen)),
        optimizer=_name(visit.sam.optimizer),
        steps=visit.done,
        watched=len(visit.looks),
        rho=visit.rho,
        loss=mean_of([look.loss for look in visit.looks]),
        perturbed_loss=mean_of([look.perturbed_loss for look in perturbed]),
        gap=mean_of([look.perturbed_loss - look.loss for look in perturbed]),
        cosine=seen.cosine,
        gradient_change=seen.change,
        perturbation=mean_of([look.displacement for look in perturbed]),
        made=seen.made,
        active=seen.claimed if visit.own else seen.moved,
        passes=statistics.fmean(visit.passes) if visit.passes else math.nan,
        time_ratio=statistics.median(visit.ratios) if visit.base and visit.family and visit.ratios else math.nan,
        batch_norm=_batch_norm(visit),
        curve=tuple(visit.curve),
        fall_base=seen.fall_base,
        fall_sam=seen.fall_sam,
        conditions=visit.problem.conditions(),
        cost=visit.problem.cost(),
    )


def _batch_norm(visit: Visit) -> BatchNormReport | None:
    errors = [look.statistics_error for look in visit.looks if not math.isnan(look.statistics_error)]
    if not errors:
        return None
    counted = [look.counted for look in visit.looks if not math.isnan(look.counted)]
    return BatchNormReport(
        statistics.median(errors),
        statistics.median(counted) if counted else math.nan,
        mean_of([look.statistics_shift for look in visit.looks]).value,
    )


def _notes(visit: Visit, seen: Evidence) -> list[str]:
    notes = []
    report = _batch_norm(visit)
    if report is not None and (report.counted > 1.5 or report.statistics_error > 0.5):
        notes.append(
            "batch normalisation is updated more than once in a step, the last time with the statistics at w + "
            "eps: flatwise.SAM keeps those of one pass at w"
        )
    usual = variant_info("asam").rho_range[0]
    if seen.adaptive and visit.rho and visit.rho < usual:
        notes.append(
            f"rho = {visit.rho:g} with an adaptive ball is below the usual {usual:g} to 5: a radius of SAM was "
            "probably carried over. An adaptive ball is scaled by |w|"
        )
    if seen.made >= LOST and abs(math.log(seen.made)) > 0.1:  # below, it is the verdict
        notes.append(f"rounding made the perturbation {seen.made:.2g} times as long as was asked for")
    gap = mean_of([look.perturbed_loss - look.loss for look in visit.looks])
    if gap.below(0.0):
        notes.append("the loss at w + eps is lower than at w: what is climbed along does not lead up")
    if not any(float(group.get("lr", 1.0)) for group in visit.sam.optimizer.param_groups):
        notes.append("the learning rate is 0 in every group: nothing can be said about the training")
    elif visit.base is not None and not seen.fall_base.above(0.0):
        notes.append("the loss does not fall with the base optimizer either: what SAM does to it cannot be judged")
    if visit.done and len(visit.batches) < visit.done:
        notes.append(f"{visit.done} steps were taken on {len(visit.batches)} batches: each was seen more than once")
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
