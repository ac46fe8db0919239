"""The verdict of the doctor: from what was seen in the steps to one word, a reason, and what to change.

Every threshold is a statement about quantities that mean the same on any task; each stands here with its reason, and in
``docs/doctor.md``. They are asked in the order of :func:`judge`, and the first that holds is the verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flatwise.measure.means import Mean, percent
from flatwise.variants import variant_info

Word = Literal["not applied", "too small", "fine", "too large"]

LOST = 0.5
"""Of a perturbation, rounding has eaten more than half: what is left is the choice of the rounding, not of SAM."""
GONE = 0.1
"""Nine tenths are eaten: there is no perturbation left to speak of."""
REMAINS = 0.5
"""More of eps than this is still in the weights after the step: it was not undone. The step itself goes against the
gradient that eps goes along, so that a step that undoes it leaves nothing, or less than nothing."""
NEGLIGIBLE = 0.01
"""Relative change of the gradient that no training notices. What SAM adds to a gradient adds up over n steps as n, what
the choice of the batch adds as sqrt(n). At 1 % it is the smaller even after 10,000 steps."""
NOTICEABLE = 0.1
"""The change that is aimed at where a radius is too small: after 100 steps it is as large as the batch noise."""
HALF = 0.5
"""SAM costs two gradients a step. Where it makes less than half of the base's progress in as many steps, it would need
four times the gradients: it is not slowed, it is kept from learning."""
PROGRESS = 0.1
"""Progress is compared only where the base takes off a tenth of the loss in these steps. Later in training SAM trades
some training loss for flatness, as it should."""
DOUBLED = 2.0
"""Likewise, a loss that rises under SAM counts as lost only where it more than doubles, and rises by more than one
batch differs from another."""


@dataclass(frozen=True)
class Evidence:
    """What the verdict is judged by.

    Attributes:
        family: whether the optimizer has a radius at all.
        rho: the radius; None without one.
        adaptive: whether the ball is scaled by the weights.
        raised: the message of an error in the user's own step.
        moved: share of the watched steps in which a gradient was computed away from w.
        claimed: share of steps that the optimizer says were perturbed; NaN where it says nothing.
        reasons: why steps were not perturbed, as the optimizer says, with the share of steps.
        ever_active: whether its schedule ever perturbs; None where it is not known.
        finite: whether the losses at w were finite, with the base optimizer alone.
        finite_sam: whether the losses at w and at w + eps were, with SAM.
        same: share of the perturbed steps whose two gradients are equal.
        left_behind: share of eps that is in the weights after the step.
        made: norm of the perturbation over the radius; NaN where they are not the same quantity.
        cosine: between both gradients.
        change: ``||g' - g|| / ||g||``.
        fall_base: how far the loss fell in these steps under the base.
        fall_sam: how far it fell under SAM.
        lag: half the base's fall minus SAM's, in pairs of batches.
        start: the loss before the first step.
        spread: standard deviation of that loss over batches.
    """

    family: bool
    rho: float | None
    adaptive: bool
    raised: str | None
    moved: float
    claimed: float
    reasons: tuple[tuple[str, float], ...]
    ever_active: bool | None
    finite: bool
    finite_sam: bool
    same: float
    left_behind: float
    made: float
    cosine: Mean
    change: Mean
    fall_base: Mean
    fall_sam: Mean
    lag: Mean
    start: float
    spread: float


@dataclass(frozen=True)
class Verdict:
    """The verdict.

    Attributes:
        word: not applied, too small, fine or too large.
        cause: the case in one or two words.
        why: in a sentence, with the numbers.
        change: what to change, as a call.
    """

    word: Word
    cause: str
    why: str
    change: str


def judge(seen: Evidence) -> Verdict:
    """Judge.

    Args:
        seen: the evidence.

    Returns:
        The first case that holds.
    """
    return _broken(seen) or _not_applied(seen) or _too_large(seen) or _too_small(seen) or _fine(seen)


def _broken(seen: Evidence) -> Verdict | None:
    if seen.raised is not None:
        return Verdict(
            "not applied",
            "the step raises",
            f"your train_step raised: {seen.raised}",
            "write optimizer.step(closure), where closure() clears the gradients, computes the loss, calls backward() "
            "and returns it; or, with flatwise, optimizer.step(lambda batch: loss_fn(model, batch), batch)",
        )
    if not seen.finite:
        return Verdict(
            "not applied",
            "loss not finite",
            "the loss is not finite at w, with the base optimizer alone: this is not SAM's doing, and there is nothing "
            "to climb",
            "make the training run without SAM first: a smaller learning rate, or look for the batch that does it",
        )
    return None


def _not_applied(seen: Evidence) -> Verdict | None:
    if seen.moved > 0:
        if seen.left_behind > REMAINS:
            return Verdict(
                "not applied",
                "not undone",
                f"after a step {percent(seen.left_behind)} of the perturbation is still in the weights: the update "
                "starts from w + eps, not from w",
                "restore the weights before the base optimizer steps; flatwise.SAM does",
            )
        if seen.made < GONE:
            return _rounded(seen, "not applied")
        if seen.same > 0.5:
            return Verdict(
                "not applied",
                "same gradient",
                "the gradient at w + eps equals the one at w: the second loss does not depend on the moved weights (a "
                "value that was cached or detached), or the loss is linear",
                "compute the loss anew from the model in every pass: loss_fn = lambda batch: "
                "criterion(model(batch[0]), batch[1])",
            )
        return None
    if not seen.family:
        return Verdict(
            "not applied",
            "no SAM",
            "the optimizer computes every gradient at w: it is a base optimizer alone",
            "optimizer = flatwise.SAM(optimizer, rho=0.05), and in the loop "
            "optimizer.step(lambda batch: loss_fn(model, batch), batch)",
        )
    if seen.rho == 0:
        return Verdict(
            "not applied",
            "zero radius",
            "rho is 0 in every parameter group",
            "optimizer = flatwise.SAM(base, rho=0.05), or group['rho'] = 0.05 in the groups",
        )
    if seen.claimed > 0:
        return _rounded(seen, "not applied")
    main = max(seen.reasons, key=lambda entry: entry[1])[0] if seen.reasons else ""
    if main == "schedule":
        never = seen.ever_active is False
        return Verdict(
            "not applied",
            "schedule",
            "the schedule is not active in any step of the training"
            if never
            else "the schedule was not active in any of these steps (it is later)",
            "leave window, warmup_steps, every and probability at their defaults, or widen them"
            if never
            else "ask again with an optimizer whose step count is inside the window",
        )
    if main:
        return Verdict(
            "not applied",
            main,
            f"no step was perturbed; the optimizer says: {main}",
            "see what each reason means in docs/step.md, under the record of a step",
        )
    return Verdict(
        "not applied",
        "one point",
        "every gradient was computed at w, although the optimizer has a radius: the second loss is not computed while "
        "the weights are moved, or step() was called without a closure",
        "optimizer.step(closure), where closure() clears the gradients, computes the loss, calls backward() and "
        "returns it",
    )


def _rounded(seen: Evidence, word: Word) -> Verdict:
    share = 0.0 if math.isnan(seen.made) else seen.made
    return Verdict(
        word,
        "rounding",
        f"{percent(share)} of the perturbation that was asked for was made: weights of this precision are too coarse "
        f"for rho = {seen.rho:g}",
        "keep the weights in float32 and use torch.autocast for speed; or flatwise.create('sam', base, "
        f"rounding='stochastic', rho={seen.rho:g})",
    )


def _too_large(seen: Evidence) -> Verdict | None:
    rho = f"{seen.rho:g}" if seen.rho is not None else "the radius"
    smaller = f"rho={float(f'{seen.rho / 4:.2g}'):g} instead of {rho}" if seen.rho else "a quarter of the radius"
    change = f"{smaller}, and ask again; or flatwise.measure.suggest_rho(model, loss_fn, data, base, total_steps=...)"
    if not seen.finite_sam:
        return Verdict(
            "too large",
            "loss not finite",
            "under SAM the loss became infinite or NaN, while it stays finite with the base optimizer alone",
            change,
        )
    if seen.cosine.below(0.0):
        return Verdict(
            "too large",
            "against the gradient",
            f"the gradient at w + eps points against the one at w (cosine {seen.cosine}): a step along it raises the "
            "loss of its own batch",
            change,
        )
    if seen.fall_base.above(PROGRESS * abs(seen.start)) and seen.lag.above(0.0):
        return Verdict(
            "too large",
            "training stalls",
            f"in these steps the loss fell by {seen.fall_base} with the base and by {seen.fall_sam} with SAM, which is "
            "less than half",
            change,
        )
    rise = -seen.fall_sam.value
    lost = rise > (DOUBLED - 1) * abs(seen.start) and rise > seen.spread
    if lost and seen.fall_sam.below(0.0) and not seen.fall_base.below(0.0):
        return Verdict(
            "too large",
            "training diverges",
            f"in these steps the loss rose from {seen.start:.3g} by {rise:.3g} with SAM, and not with the base",
            change,
        )
    return None


def _too_small(seen: Evidence) -> Verdict | None:
    if seen.made < LOST:
        return _rounded(seen, "too small")
    if not seen.change.below(NEGLIGIBLE):
        return None
    change = seen.change.value
    larger = ""
    if seen.rho:
        # Below one per cent the change grows about as the radius does. A change that is all rounding says less.
        low, high = variant_info("asam" if seen.adaptive else "sam").rho_range
        wanted = min(seen.rho * NOTICEABLE / max(change, 1e-12), max(high, 100 * seen.rho))
        if seen.adaptive:
            wanted = max(wanted, low)
        larger = f"rho={wanted:.1g} instead of {seen.rho:g}, and ask again; or "
    scaled = " (an adaptive ball is scaled by |w| and wants a radius about ten times SAM's)" if seen.adaptive else ""
    return Verdict(
        "too small",
        "negligible",
        f"the gradient at w + eps differs from the one at w by {percent(change)}, which no training notices{scaled}",
        f"{larger}flatwise.measure.suggest_rho(model, loss_fn, data, base, total_steps=...)",
    )


def _fine(seen: Evidence) -> Verdict:
    return Verdict(
        "fine",
        "fine",
        f"SAM acts: it changes the gradient by {percent(seen.change.value)} (cosine {seen.cosine}), and the "
        "training goes on. Whether it helps, a comparison says, not this",
        "nothing; which radius is best, flatwise.measure.suggest_rho(...) and flatwise compare try",
    )
