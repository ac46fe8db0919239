"""What the doctor reports: the verdict, and the numbers that it rests on."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any

from flatwise.measure.means import Mean, percent
from flatwise.measure.result import Conditions, Cost, plain
from flatwise.measure.verdicts import Word

_WIDTH = 100


@dataclass(frozen=True)
class BatchNormReport:
    """What the steps did to batch normalisation.

    Attributes:
        statistics_error: distance of the running statistics after a step from those of one pass at w, in units of what
            that pass changes; 0 is exact, about 1 is what a second pass does.
        counted: by how much a step raises ``num_batches_tracked``; 1 is right. NaN where it is not tracked.
        shift: distance between the batch means at w and at w + eps, in standard deviations (median over channels).
    """

    statistics_error: float
    counted: float
    shift: float


@dataclass(frozen=True)
class Diagnosis:
    """What was found on a copy of the model and the optimizer.

    Attributes:
        verdict: ``"not applied"``, ``"too small"``, ``"fine"`` or ``"too large"``.
        cause: the case in one or two words.
        why: a sentence with the numbers.
        change: what to change, as a call.
        notes: what else was seen, in sentences.
        optimizer: its name.
        steps: how many were taken.
        watched: in how many of them loss and gradient at both points were evaluated.
        rho: the radius; None where the optimizer has none.
        loss: at w.
        perturbed_loss: at w + eps.
        gap: the second minus the first.
        cosine: between the two gradients of a step.
        gradient_change: ``||g' - g|| / ||g||``.
        perturbation: L2 norm of what was really added to the weights.
        made: the perturbation's norm over the radius, in the norm that the radius is meant in; 1 is exact. NaN where
            the method's radius is not a norm.
        active: share of steps that were perturbed.
        passes: gradients computed per step.
        time_ratio: time of a step over that of the base's, steps taken in turn (median); NaN without a base, or where
            the optimizer is a base itself.
        batch_norm: None without batch normalisation.
        curve: (step, loss with the base, loss with SAM) on the same batches, before the step; NaN without a base.
        fall_base: how far the loss of other batches fell in all steps with the base.
        fall_sam: how far it fell with SAM.
        conditions: of the measurement.
        cost: of the measurement.
    """

    verdict: Word
    cause: str
    why: str
    change: str
    notes: tuple[str, ...]
    optimizer: str
    steps: int
    watched: int
    rho: float | None
    loss: Mean
    perturbed_loss: Mean
    gap: Mean
    cosine: Mean
    gradient_change: Mean
    perturbation: Mean
    made: float
    active: float
    passes: float
    time_ratio: float
    batch_norm: BatchNormReport | None
    curve: tuple[tuple[int, float, float], ...]
    fall_base: Mean
    fall_sam: Mean
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
        head = f"flatwise doctor: {self.optimizer}, {self.steps} steps on a copy"
        lines = [head, "", *_paragraph("verdict", self.verdict.upper()), *_paragraph("why", self.why)]
        lines += [*_paragraph("change", self.change), ""]
        lines += [f"  {label:<32}{text}" for label, text in self._rows()]
        if self.notes:
            lines += ["", *(line for note in self.notes for line in _paragraph("note", note))]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("loss at w", str(self.loss))] if self.watched else []
        if math.isnan(self.perturbation.value):
            rows.append(("perturbation", "none"))
        else:
            relative = abs(self.gap.value / self.loss.value) if self.loss.value else math.nan
            rows += [
                ("loss at w + eps", str(self.perturbed_loss)),
                ("gap", f"{self.gap}   ({percent(relative)} of the loss)"),
                ("cosine of both gradients", _short(self.cosine)),
                ("change of the gradient", percent(self.gradient_change.value)),
                ("perturbation, L2 norm", _short(self.perturbation)),
            ]
        if self.rho is not None:
            made = "" if math.isnan(self.made) else f"   (made / asked: {self.made:.3g})"
            rows.append(("radius", f"{self.rho:g}{made}"))
        # A step that raised at once leaves nothing to be said, and a base optimizer alone is its own base.
        if self.steps:
            rows.append(("active steps", f"{100 * self.active:.0f} %"))
            ratio = "" if math.isnan(self.time_ratio) else f", {self.time_ratio:.2f} times the base's time"
            rows.append(("cost of a step", f"{self.passes:.3g} gradient{'s' * (self.passes != 1)}{ratio}"))
        if self.batch_norm is not None:
            bn = self.batch_norm
            off = bn.statistics_error
            away = "as after one clean pass" if off < 1e-6 else f"{off:.2g} of a pass away from those of one clean pass"
            rows.append(("batch norm, running statistics", away))
            if not math.isnan(bn.shift):
                rows.append(("batch norm at w + eps", f"means shifted by {bn.shift:.2g} standard deviations"))
        if self.steps:
            rows.append(("loss fell, this optimizer", str(self.fall_sam)))
        if self.steps and self.rho is not None and not math.isnan(self.fall_base.value):
            rows.append(("loss fell, base alone", str(self.fall_base)))
            rows += [("loss, base -> this one", _curve(self.curve))]
        where = f"{self.conditions.samples} samples, mode {self.conditions.mode}, {self.conditions.dtype}"
        rows.append(("measured on", f"{where}, seed {self.conditions.seed}; {self.cost.seconds:.1f} s"))
        return rows


def _paragraph(label: str, text: str) -> list[str]:
    rows = textwrap.wrap(text, _WIDTH - 12) or [""]
    return [f"  {label if number == 0 else '':<10}{row}" for number, row in enumerate(rows)]


def _short(mean: Mean) -> str:
    """Leave out digits beyond the fifth: they are real here, and tell nobody anything."""
    small = math.isnan(mean.error) or mean.error < 1e-5 * abs(mean.value)
    return f"{mean.value:.5g}" if small else str(mean)


def _curve(curve: tuple[tuple[int, float, float], ...]) -> str:
    places = sorted({0, (len(curve) - 1) // 2, len(curve) - 1}) if curve else []
    return "   ".join(f"step {curve[i][0]}: {curve[i][1]:.3g} -> {curve[i][2]:.3g}" for i in places)
