"""What stands below a picture of a landscape: under which conditions it holds, and what it cannot show."""

from __future__ import annotations

from typing import Any

import torch

from flatwise.measure.landscape_result import Landscape
from flatwise.measure.result import digits
from flatwise.report.heights import Heights


def facts_of(landscape: Landscape, heights: Heights) -> list[str]:
    """Say in a few words each under which conditions the picture holds."""
    total, evaluated = landscape.values.numel(), landscape.evaluations
    c = landscape.conditions
    facts = [f"{c.samples:,} samples", f"mode {c.mode}", f"{c.dtype} on {c.device}"]
    statistics = {
        "none": "no batch normalisation",
        "recompute": "batch norm: statistics recomputed at every point",
        "frozen": "batch norm: frozen running statistics, which fit other weights badly",
        "batch": "batch norm: statistics of each batch",
    }
    facts.append(statistics[landscape.batch_norm])
    kinds = list(dict.fromkeys(landscape.directions))
    facts.append("directions: " + ", ".join(kinds) + (", orthogonal" if landscape.orthogonalize else ""))
    if any(kind.startswith("random") for kind in kinds):
        facts.append(f"seed {landscape.seed}")
    if not landscape.complete:
        rest = f", {heights.predicted} predicted" if heights.predicted else ""
        facts.append(f"INCOMPLETE: {evaluated} of {total} points measured{rest}")
    elif evaluated < total:
        errors = [error for error in landscape.error_seen if error is not None]
        facts.append(
            f"{evaluated} of {total} points measured, the rest predicted"
            + (f" (checks: within {100 * max(errors):.1f} % of the range)" if errors else "")
        )
    if heights.cut:
        facts.append(f"cut above {heights.high:.3g} ({heights.cut} points)")
    if heights.gaps:
        facts.append(f"{heights.gaps} points without a finite loss left out")
    if landscape.dimensions == 1 and bool(torch.isfinite(landscape.standard_errors).any()):
        facts.append("bands: one standard error of the samples")
    facts.append(f"measured in {landscape.cost.seconds:.3g} s")
    return facts + [_number(key, value) for key, value in landscape.annotate.items()]


def _number(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{key}: " + ", ".join(f"{name} {_short(entry)}" for name, entry in value.items())
    return f"{key}: {_short(value)}"


def _short(value: Any) -> str:
    return digits(float(value), None) if isinstance(value, int | float) else str(value)


def limits_of(landscape: Landscape) -> str:
    """Say what the picture cannot show."""
    weights = f"{landscape.conditions.weights:,}"
    cut = f"A {landscape.dimensions}-D cut through {weights} dimensions"
    if all(kind.startswith("random") for kind in landscape.directions):
        return f"{cut}, drawn at random: it hardly meets the few directions in which the loss bends most."
    if landscape.track is not None:
        shares = sum(landscape.explained)
        return f"{cut}, with {100 * shares:.1f} % of the variance of the recorded weights; the run leaves the plane."
    return f"{cut}: what lies beside it is not seen."
