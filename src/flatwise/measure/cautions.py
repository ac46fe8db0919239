"""What a reader should know before using a number: sentences about the rows of one model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatwise.measure.problem import Problem
from flatwise.measure.result import digits
from flatwise.measure.rows import Row
from flatwise.norms import COARSE

NORMALISING = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm)
"""Layers after which the scale of the weights before them is of no consequence."""

FEW = 10
"""Fewer clusters than these give a standard error that is itself uncertain by a quarter or more."""


def cautions(rows: Sequence[Row], problem: Problem) -> list[str]:
    """Find what to be careful about.

    Args:
        rows: of one model.
        problem: what they were measured on.

    Returns:
        Sentences.
    """
    known = {row.name: row for row in rows}
    found = [*_not_finite(rows), *_about_errors(rows, problem), *_in_noise(rows)]
    found += [*_about_slope(known), *_about_noise(known), *_about_size(known), *_about_steps(known)]
    found += [*_about_scale(known, problem), *_about_rounding(problem)]
    return found


def _not_finite(rows: Sequence[Row]) -> Iterator[str]:
    names = [row.name for row in rows if not math.isfinite(row.value)]
    if names:
        yield f"{_listed(names)} not finite: the loss or its gradient is not, at w or near it"


def _about_errors(rows: Sequence[Row], problem: Problem) -> Iterator[str]:
    parts = len(problem.parts)
    if all(row.standard_error is None for row in rows if row.name != "gradient_norm"):
        yield (
            "the data came as one part, from which no standard error over samples can be told: pass several batches, "
            "or micro_batch_size="
        )
    elif parts < FEW and problem.group is None:
        yield f"standard errors come from {parts} parts of the data, and are rough themselves: more parts tell more"


def _in_noise(rows: Sequence[Row]) -> Iterator[str]:
    names = [
        row.name
        for row in rows
        if row.standard_error is not None and row.name != "loss" and abs(row.value) < 2 * row.standard_error
    ]
    if names:
        yield f"{_listed(names)} within two standard errors of 0: more samples or draws would tell"


def _about_slope(known: dict[str, Row]) -> Iterator[str]:
    if "gradient_norm" not in known or "one_step" not in known:
        return
    gap, norm = known["one_step"], known["gradient_norm"].value
    rho = gap.settings["rho"]
    if gap.value > 0 and rho * norm > gap.value / 2:
        share = min(100.0, 100 * rho * norm / gap.value)
        yield (
            f"w is not at a minimum of this loss: the slope, rho * ||g|| = {rho:g} * {norm:.3g} = {rho * norm:.3g}, "
            f"makes up {share:.0f} % of one_step, which says more about the slope than about curvature"
        )


def _about_noise(known: dict[str, Row]) -> Iterator[str]:
    if "gradient_norm" not in known or not any(name.startswith(("one_step", "n_steps")) for name in known):
        return
    norm, noise = known["gradient_norm"].value, known["gradient_norm"].settings.get("noise", 0.0)
    if noise > norm / 2:
        yield (
            f"of the gradient's norm, {norm:.3g}, sampling alone would give {noise:.3g}: on these samples uphill is "
            "partly noise, and the worst cases are larger than on more samples"
        )


def _about_size(known: dict[str, Row]) -> Iterator[str]:
    """Hold the worst case against the quadratic model, ``rho^2/2 lambda <= max <= rho ||g|| + rho^2/2 lambda``."""
    if not {"gradient_norm", "n_steps", "lambda_max"} <= known.keys():
        return
    gap, norm, top = known["n_steps"], known["gradient_norm"].value, known["lambda_max"].value
    rho = gap.settings["rho"]
    low, high = rho**2 / 2 * top, rho * norm + rho**2 / 2 * top
    noise = 2 * (gap.standard_error or 0.0)
    if gap.value - noise > 1.2 * high:
        yield (
            f"rho={rho:g} is so large that the quadratic model fails: the loss rises by {gap.value:.3g}, while slope "
            f"and curvature allow {high:.3g}; lambda_max does not explain the worst case"
        )
    elif gap.value + noise < 0.8 * low:
        yield (
            f"at rho={rho:g} the loss rises by {gap.value:.3g} only, while curvature alone, rho^2/2 * lambda_max, "
            f"would give {low:.3g}: the ascent has not arrived (more steps would tell), or the quadratic model fails"
        )


def _about_steps(known: dict[str, Row]) -> Iterator[str]:
    for name, one in known.items():
        several = known.get(name.replace("one_step", "n_steps"))
        if name.startswith("one_step") and several is not None and several.value > 1.5 * max(one.value, 0.0):
            gaps = f"{digits(one.value, one.standard_error)}, {digits(several.value, several.standard_error)}"
            yield f"{name} is far from the worst case: {several.name} finds more ({gaps})"


def _about_scale(known: dict[str, Row], problem: Problem) -> Iterator[str]:
    layers = sum(isinstance(module, NORMALISING) for module in problem.model.modules())
    if layers and known.keys() & {"one_step", "n_steps", "one_step_inf", "n_steps_inf", "average", "lambda_max"}:
        yield (
            f"the model has {layers} normalising layer{'' if layers == 1 else 's'}: weights before such a layer can be "
            "rescaled without changing what the model computes, and the plain measures change with them (Dinh et al., "
            "2017); between models, compare the adaptive ones"
        )


def _about_rounding(problem: Problem) -> Iterator[str]:
    coarse = {str(p.dtype).removeprefix("torch.") for p in problem.params if p.dtype in COARSE}
    if coarse:
        names = ", ".join(sorted(coarse))
        yield f"weights are {names}: small perturbations are lost to rounding; measure a float32 copy"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
