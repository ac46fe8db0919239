"""From landscape.json to what the page draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flatwise.report.flatness import condition_words
from flatwise.report.planes import Plane
from flatwise.report.scales import short
from flatwise.report.surface3d import Surface

if TYPE_CHECKING:
    from flatwise.measure import Landscape

NORMS = {
    "recompute": "Batch-norm statistics gathered anew at every point.",
    "frozen": "Batch-norm statistics of the trained weights, which fit other weights badly.",
    "batch": "Batch-norm statistics of each batch.",
    "none": "",
}


def plane_of(seen: Landscape) -> Plane:
    """Turn a landscape, complete or not, into what the page draws.

    Args:
        seen: the losses.

    Returns:
        What the page draws.
    """
    grids = seen.values.tolist() if seen.dimensions == 2 else seen.values.unsqueeze(-1).tolist()
    surfaces = [
        Surface(name, [[value if math.isfinite(value) else None for value in row] for row in grid])
        for name, grid in zip(seen.names, grids, strict=True)
    ]
    return Plane(
        # How they are scaled is in the caption.
        axes=[label.partition(",")[0] for label in seen.labels],
        x=seen.axes[0],
        y=seen.axes[1] if seen.dimensions == 2 else (),
        surfaces=surfaces,
        caption=_caption(seen),
    )


def _caption(seen: Landscape) -> str:
    parts = [f"Directions: {' and '.join(dict.fromkeys(seen.directions))}."]
    parts.append(NORMS.get(seen.batch_norm, f"Batch-norm statistics: {seen.batch_norm}."))
    parts.append(condition_words({**vars(seen.conditions)}))
    parts.append(f"{seen.evaluations} of {seen.values.numel()} points evaluated, {seen.cost.seconds:.0f} s.")
    largest = seen.annotate.get("lambda_max")
    if isinstance(largest, Mapping):
        values = ", ".join(f"{name} {short(value)}" for name, value in largest.items())
        parts.append(f"Largest eigenvalue of the Hessian: {values}.")
    if not seen.complete:
        parts.append("Not complete yet.")
    parts.append("A plane is a cut of two dimensions through very many: it misses what lies beside it.")
    return " ".join(part for part in parts if part)
