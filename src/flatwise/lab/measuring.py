"""``flatwise measure`` and ``flatwise landscape``: the measures, of a run's networks, into its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flatwise.files import make_folder, write_json
from flatwise.lab.reporting import MEASURES, read_measures
from flatwise.lab.subjects import Subjects
from flatwise.measure import Landscape, Row, Sharpness, compare_sharpness, hessian_density, landscape, sharpness
from flatwise.measure.result import Conditions, Cost

LANCZOS_STEPS = 60


@dataclass(frozen=True)
class Wanted:
    """What is measured of each network.

    Attributes:
        samples: that were asked for.
        rho: radius of the plain ball.
        m: sizes of micro-batches.
        probes: random vectors for the density of the Hessian's eigenvalues; 0 leaves it out.
    """

    samples: int
    rho: float
    m: Sequence[int]
    probes: int


def measure_all(subjects: Subjects, wanted: Wanted, *, fresh: bool = False, progress: bool = True) -> dict[str, Any]:
    """Measure the networks, and write measures.json after each.

    What was measured before with the same settings is kept.

    Args:
        subjects: the networks.
        wanted: what to measure.
        fresh: measure again what is there.
        progress: whether bars may be shown on a terminal.

    Returns:
        An entry for each network that was asked for.
    """
    make_folder(subjects.folder.path)
    settings = {**asdict(wanted), "m": list(wanted.m), "seed": subjects.seed}
    entries, _ = read_measures(subjects.folder, subjects.identity)
    for name, model in subjects.models.items():
        known = entries.get(name, {})
        if not fresh and known.get("settings") == settings:
            continue
        table = sharpness(model, subjects.loss_fn, subjects.data, rho=wanted.rho, m=tuple(wanted.m), progress=progress)
        entries[name] = {"seed": subjects.seed, "settings": settings, "sharpness": _spelt(table.as_dict())}
        if wanted.probes:
            density = hessian_density(
                model,
                subjects.loss_fn,
                subjects.data,
                iterations=LANCZOS_STEPS,
                probes=wanted.probes,
                progress=progress,
            )
            entries[name]["density"] = density.as_dict()
        content = {
            "schema": MEASURES,
            "identity": subjects.identity,
            "methods": entries,
            "cautions": _compared(entries),
        }
        write_json(subjects.folder.measures, content)
    return {name: entries[name] for name in subjects.models}


def _compared(entries: Mapping[str, Any]) -> list[str]:
    """Say where the measures disagree about which network is flatter."""
    tables = {name: _table(entry["sharpness"]) for name, entry in entries.items()}
    return list(compare_sharpness(tables).cautions) if len(tables) > 1 else []


def _table(content: Mapping[str, Any]) -> Sharpness:
    # A value that was no number is null in the file.
    rows = [Row(**{**row, "value": math.nan if row["value"] is None else row["value"]}) for row in content["rows"]]
    return Sharpness(
        rows=tuple(rows),
        loss=content["loss"],
        cautions=tuple(content["cautions"]),
        conditions=Conditions(**content["conditions"]),
        cost=Cost(**content["cost"]),
    )


def _spelt(table: dict[str, Any]) -> dict[str, Any]:
    # p = inf is a setting, not a number that went wrong: JSON would make it null.
    for row in table["rows"]:
        row["settings"] = {key: "inf" if value == math.inf else value for key, value in row["settings"].items()}
    return table


def survey(
    subjects: Subjects,
    *,
    points: int,
    directions: Any,
    line: bool,
    extent: float | None,
    fresh: bool = False,
    progress: bool = True,
) -> Landscape:
    """Measure the loss around the networks, into landscape.json.

    Args:
        subjects: the networks.
        points: on each axis.
        directions: as :func:`flatwise.measure.landscape` takes them.
        line: along a line, not over a plane.
        extent: how far from the weights.
        fresh: forget what the file holds.
        progress: whether a bar may be shown on a terminal.

    Returns:
        The losses.
    """
    make_folder(subjects.folder.path)
    path = subjects.folder.landscape
    if fresh:
        path.unlink(missing_ok=True)
    return landscape(
        subjects.models,
        subjects.loss_fn,
        subjects.data,
        directions=directions,
        dimensions=1 if line else 2,
        points=points,
        extent=extent,
        path=path,
        annotate=_largest_eigenvalues(subjects),
        seed=subjects.seed,
        progress=progress,
    )


def _largest_eigenvalues(subjects: Subjects) -> dict[str, dict[str, float]]:
    """Read what stands on the figure, where it was measured before."""
    found = {}
    for name, entry in read_measures(subjects.folder, subjects.identity)[0].items():
        rows = {row["name"]: row["value"] for row in entry["sharpness"]["rows"]}
        if name in subjects.models and entry["seed"] == subjects.seed and rows.get("lambda_max") is not None:
            found[name] = rows["lambda_max"]
    return {"lambda_max": found} if found else {}
