"""A radius from a short probe: the largest one that costs next to nothing.

Early in a training nobody can see what a radius will gain at its end, but what it costs can be seen at once: the
direction that SAM steps in may lead down less than the base's, on samples that it was not made from. The suggestion is
the largest radius whose direction still does, to within 5 %, and still holds the batch's own gradient
(:mod:`flatwise.measure.agreement`; ``docs/doctor.md`` derives the rule). Where labels are noisy, a perturbed gradient
agrees with other samples better than the plain one, and the radius comes out large; where they are clean, small.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from flatwise.bsam import BSAM
from flatwise.errors import UserError
from flatwise.measure.agreement import Agreement, Reading
from flatwise.measure.ladder import BORNE, LEAST_COSINE, chosen, search
from flatwise.measure.problem import LossFn, Mode, Problem
from flatwise.measure.progress import Bar
from flatwise.measure.result import Conditions, Cost, plain
from flatwise.measure.twin import Twin, generators_of, some_batches
from flatwise.measure.unchanged import unchanged
from flatwise.optimizer import SAM
from flatwise.schedule import Schedule
from flatwise.variants import create, variant_info

WARM = 0.3
"""Share of the probe that trains the copy first: at its first weights a network is unlike what it will be."""
READINGS = 5
"""Radii that are looked at: three to bracket the answer by factors of four, two to halve the bracket."""
MOST_BATCHES, LEAST_BATCHES = 8, 3
GIVEN = "the given optimizer"
START_ONLY = (
    "this is seen at the start of a training, whose end can want a radius several times smaller (see docs/doctor.md): "
    "compare it, and smaller ones, with the base"
)


@dataclass(frozen=True)
class RhoSuggestion:
    """A radius, and why.

    Attributes:
        rho: the radius, two digits.
        method: of the family; :data:`GIVEN` where the optimizer was a :class:`flatwise.SAM`.
        candidates: what was found at each radius that was tried, rising; none for a method with one pass, whose own
            radius is the answer.
        reason: in words.
        notes: what a reader should know, in sentences.
        steps: that the copy was trained for first.
        batches: that were looked at.
        gradients: that the probe computed, in units of one batch.
        allowed: gradients that it might have computed: ``share`` of those of the training.
        base_agreement: mean of A(0), the descent on other samples along the base's direction; with its standard error.
        conditions: of the measurement.
        cost: of the measurement.
    """

    rho: float
    method: str
    candidates: tuple[Reading, ...]
    reason: str
    notes: tuple[str, ...]
    steps: int
    batches: int
    gradients: float
    allowed: float
    base_agreement: tuple[float, float]
    conditions: Conditions
    cost: Cost

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain Python.

        Returns:
            What JSON can hold (NaN stands where there is no number).
        """
        result: dict[str, Any] = plain(self)
        return result

    def __str__(self) -> str:
        """Write the page for the terminal."""
        lines = [f"suggested radius for {self.method}: rho = {self.rho:g}", f"  {self.reason}"]
        if not self.candidates:
            return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
        lines += ["", f"  {'rho':>9}  {'descent on other samples':>25}  {'cosine with own gradient':>25}"]
        for entry in self.candidates:
            share = f"{100 * entry.agreement:.0f} % of the base's"
            mark = "" if entry.harmless else "  too much"
            lines.append(f"  {entry.rho:>9.3g}  {share:>25}  {entry.cosine!s:>25}{mark}")
        lines += ["", f"  {self.gradients:g} gradients of a batch (allowed: {self.allowed:g}): {self.steps} steps of"]
        lines[-1] += f" training first, then {self.batches} batches at each radius; {self.cost.seconds:.1f} s"
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def suggest_rho(
    model: Module,
    loss_fn: LossFn,
    data: Any,
    optimizer: Any,
    *,
    total_steps: int,
    method: str = "sam",
    share: float = 0.05,
    mode: Mode = "train",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> RhoSuggestion:
    """Suggest a radius for a training, at the cost of at most a twentieth of it.

    A copy is trained for some steps first, then directions at several radii are compared on some batches. Model,
    optimizer, gradients, buffers, random state and a DataLoader's generators are left as they were, bit for bit.

    Args:
        model: as it will be trained, or as it is in the middle of its training.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch (for ``k-sam`` and ``esam-sds``, one loss
            for each sample).
        data: training batches, of which the first are used.
        optimizer: the base optimizer; or a :class:`flatwise.SAM`, whose method is then the one that is asked about.
        total_steps: how long the training is.
        method: a name of :func:`flatwise.list_variants`, where ``optimizer`` is a base optimizer.
        share: of the training's gradients that may be computed.
        mode: ``"train"``, or ``"as is"``, where parts of the model stay in evaluation mode.
        seed: of what the loss draws.
        progress: show a bar where it takes long.
        **options: of the method, as :func:`flatwise.create` takes them.

    Returns:
        The suggestion; print it.

    Raises:
        UserError: bad arguments, or a training that is too short.
    """
    if not isinstance(total_steps, int) or total_steps < 1:
        raise UserError(f"total_steps must be the number of steps of the training, got {total_steps!r}")
    if not 0 < share <= 1:
        raise UserError(f"share must be in (0, 1], got {share!r}")
    model = model.module if isinstance(model, DistributedDataParallel) else model
    with generators_of(data), unchanged(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* of the perturbation arrives")
        twin, name, always = _prepared(model, optimizer, method, options)
        if twin.optimizer._auto is not None:
            raise UserError("the radius of this method sets itself (rho='auto'): there is none to suggest")
        start = optimizer_rho(optimizer) or variant_info("sam" if name == GIVEN else name).rho
        if twin.optimizer._method.one_pass:
            problem = Problem(twin.model, loss_fn, iter(some_batches(data, 1)), mode=mode, seed=seed)
            return _own_radius(start, name, share * total_steps, problem)
        look = Agreement(twin, loss_fn, borne=BORNE, least_cosine=LEAST_COSINE, seed=seed)
        allowed = share * total_steps * (look.passes if always else 1)
        steps, count, readings = _plan(look, allowed, share, total_steps)
        batches = some_batches(data, steps + count)
        problem = Problem(twin.model, loss_fn, iter(batches), mode=mode, seed=seed)
        batches = [problem._placed(batch) for batch in problem.batches]
        count = min(count, len(batches) - 1) if len(batches) <= count else count
        if count < LEAST_BATCHES:
            raise UserError(
                f"the probe compares at least {LEAST_BATCHES} batches: cut the {len(batches)} given smaller"
            )
        with Bar("suggest_rho", steps + readings, shown=progress) as bar, problem.open():
            look.train(batches[:-count], steps)
            bar.advance(steps)
            look.stand(batches[-count:])
            found = search(lambda rho: _advanced(look.read(rho), bar), start, readings)
        rho, reason, notes = chosen(found)
        notes.append(START_ONLY)
        if look.base.value <= 2 * look.base.error:
            notes.append("without a perturbation too, the gradients of different batches hardly agree: the radius is "
                         "uncertain")  # fmt: skip
        if len(batches) < steps + count:
            notes.append(f"{len(batches)} batches were given; {steps + count} would not have been used twice")
        problem.gradient_evaluations += look.spent / len(batches)
        return RhoSuggestion(
            rho=rho,
            method=name,
            candidates=tuple(sorted(found, key=lambda reading: reading.rho)),
            reason=reason,
            notes=tuple(notes),
            steps=steps,
            batches=count,
            gradients=look.spent,
            allowed=allowed,
            base_agreement=(look.base.value, look.base.error),
            conditions=problem.conditions(),
            cost=problem.cost(),
        )


def _own_radius(rho: float, method: str, allowed: float, problem: Problem) -> RhoSuggestion:
    """Answer for a method with one pass without a probe.

    It moves every batch along one direction. Where this is the way that the weights have just gone down, the other
    batches have less left to gain there, at any radius that does something: what a radius costs at once says nothing.
    """
    return RhoSuggestion(
        rho=rho,
        method=method,
        candidates=(),
        reason="the radius that it has: the probe's rule does not fit a method with one pass, and nothing was measured",
        notes=("compare it, and radii three times smaller and larger, with the base",),
        steps=0,
        batches=0,
        gradients=0.0,
        allowed=allowed,
        base_agreement=(math.nan, math.nan),
        conditions=problem.conditions(),
        cost=problem.cost(),
    )


def _advanced(reading: Reading, bar: Bar) -> Reading:
    bar.advance()
    return reading


def optimizer_rho(optimizer: Any) -> float | None:
    """Return the radius that a method has already, from which the search starts.

    Args:
        optimizer: the one that the user gave.

    Returns:
        The largest of its groups; None for a base optimizer, and where it is 0.
    """
    if not isinstance(optimizer, SAM):
        return None
    return max(float(group[optimizer._rho_key]) for group in optimizer.param_groups) or None


def _prepared(model: Module, optimizer: Any, method: str, options: dict[str, Any]) -> tuple[Twin, str, bool]:
    """Copy the model with the method's optimizer; say whether it perturbs every step."""
    if isinstance(optimizer, BSAM) or method == "bsam":
        raise UserError("suggest_rho watches what a method hands to its base optimizer, and bSAM has none")
    if isinstance(optimizer, SAM):
        if options or method != "sam":
            raise UserError("the optimizer is a flatwise.SAM already: pass its base optimizer to name a method")
        always = optimizer._schedule == Schedule(total_steps=optimizer._schedule.total_steps)
        return Twin(model, optimizer), GIVEN, always
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer must be a base optimizer or a flatwise.SAM, got {type(optimizer).__name__}")
    twin = Twin(model, optimizer)
    row = variant_info(method)
    given = {"model": twin.model} if "model" in row.needs else {}
    try:
        twin.optimizer = create(method, twin.optimizer, **{**given, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"method {method!r}: {error}") from error
    schedule = twin.optimizer._schedule
    return twin, method, bool(schedule == Schedule(total_steps=schedule.total_steps))


def _plan(look: Agreement, allowed: float, share: float, total_steps: int) -> tuple[int, int, int]:
    """Share the gradients out: steps of training, batches that are looked at, radii."""
    steps = math.floor(WARM * allowed / look.warm_price)
    rest = allowed - steps * look.warm_price
    count = min(MOST_BATCHES, math.floor(rest / (1 + READINGS * look.price)))
    if count < LEAST_BATCHES:
        least = LEAST_BATCHES * (1 + READINGS * look.price) / (1 - WARM)
        needed = math.ceil(least * share * total_steps / allowed / share)
        raise UserError(
            f"{share:.0%} of {total_steps} steps are {allowed:.0f} gradients, and the probe needs {math.ceil(least)}: "
            f"give a larger share, or train for {needed} steps or more"
        )
    # What the cap on batches leaves over goes into more training, which makes the weights those of a later time.
    steps = math.floor((allowed - count * (1 + READINGS * look.price)) / look.warm_price)
    return steps, count, READINGS
