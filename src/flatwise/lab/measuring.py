"""``flatwise measure`` and ``flatwise landscape``: the measures, of a run's networks, into its folder."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from flatwise.errors import UserError
from flatwise.files import make_folder, write_json
from flatwise.lab.reporting import MEASURES, read_measures
from flatwise.lab.subjects import Subjects
from flatwise.measure import Landscape, Row, Sharpness, compare_sharpness, hessian_density, landscape, sharpness
from flatwise.measure.problem import Problem
from flatwise.measure.progress import spoken
from flatwise.measure.result import Conditions, Cost

LANCZOS_STEPS = 60
SHARPNESS = 150
"""Gradients that a table of sharpness takes, about; most of them for eigenvalues and trace."""
PARTS = ("sharpness", "density")


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
    kept = {name: {} if fresh else _kept(entries.get(name, {}), settings) for name in subjects.models}
    open_ = [name for name, entry in kept.items() if _lacking(entry, wanted)]
    if progress and open_:
        _announce(subjects, open_, kept, wanted)
    for number, name in enumerate(open_, start=1):
        if progress:
            sys.stderr.write(f"{name} ({number} of {len(open_)})\n")
        for part in _lacking(kept[name], wanted):
            # Written after each part, so that what is interrupted goes on where it stopped.
            found = {"seed": subjects.seed, "settings": settings, **kept[name]}
            found[part] = _measured(part, subjects, name, wanted, progress)
            kept[name] = entries[name] = found
            content = {
                "schema": MEASURES,
                "identity": subjects.identity,
                "methods": entries,
                "cautions": compared(entries),
            }
            write_json(subjects.folder.measures, content)
    return kept


def _kept(known: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take over what was measured before with the same settings; the probes are those of the density alone."""
    before = known.get("settings", {})
    if {**before, "probes": None} != {**settings, "probes": None}:
        return {}
    same = before.get("probes") == settings["probes"] or not settings["probes"]
    return dict(known) if same else {"sharpness": known["sharpness"]}


def _lacking(entry: Mapping[str, Any], wanted: Wanted) -> list[str]:
    return [part for part in PARTS if part not in entry and (part == "sharpness" or wanted.probes)]


def _measured(part: str, subjects: Subjects, name: str, wanted: Wanted, progress: bool) -> dict[str, Any]:
    same = subjects.models[name], subjects.loss_fn, subjects.data
    if part == "sharpness":
        return _spelt(sharpness(*same, rho=wanted.rho, m=tuple(wanted.m), progress=progress).as_dict())
    found = hessian_density(*same, iterations=LANCZOS_STEPS, probes=wanted.probes, progress=progress)
    return found.as_dict()


def _announce(subjects: Subjects, names: Sequence[str], kept: Mapping[str, Mapping[str, Any]], wanted: Wanted) -> None:
    """Say how long it will take before it does, from the time of one gradient."""
    problem = Problem(subjects.models[names[0]], subjects.loss_fn, subjects.data)
    with problem.open():
        problem.gradient()  # the first is slower
        start = time.perf_counter()
        problem.gradient()
        one = time.perf_counter() - start
    parts = [part for name in names for part in _lacking(kept[name], wanted)]
    gradients = sum(SHARPNESS if part == "sharpness" else 2 * LANCZOS_STEPS * wanted.probes for part in parts)
    sys.stderr.write(
        f"{len(names)} network{'s' * (len(names) > 1)}: about {spoken(gradients * one)} "
        f"({gradients} gradients of {one:.2g} s); Ctrl-C stops, the same command goes on\n"
    )


def compared(entries: Mapping[str, Any]) -> list[str]:
    """Say where the measures disagree about which network is flatter.

    Args:
        entries: by the network.

    Returns:
        Cautions.
    """
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


class Cut(Protocol):
    """Where the loss is measured around the weights."""

    @property
    def points(self) -> int:
        """On each axis."""

    @property
    def directions(self) -> Literal["random", "sam", "hessian"]:
        """As :func:`flatwise.measure.landscape` takes them."""

    @property
    def style(self) -> str:
        """``"line"`` measures along a line; everything else, over a plane."""

    @property
    def extent(self) -> float | None:
        """How far from the weights; None: what the directions need."""


def survey(subjects: Subjects, cut: Cut, *, fresh: bool = False, progress: bool = True) -> Landscape:
    """Measure the loss around the networks, into landscape.json.

    Args:
        subjects: the networks.
        cut: where.
        fresh: forget what the file holds.
        progress: whether a bar may be shown on a terminal.

    Returns:
        The losses.

    Raises:
        UserError: the file holds another landscape or is damaged, or an argument does not fit.
    """
    make_folder(subjects.folder.path)
    path = subjects.folder.landscape
    if fresh:
        path.unlink(missing_ok=True)
    try:
        return landscape(
            subjects.models,
            subjects.loss_fn,
            subjects.data,
            directions=cut.directions,
            dimensions=1 if cut.style == "line" else 2,
            points=cut.points,
            extent=cut.extent,
            path=path,
            annotate=_largest_eigenvalues(subjects),
            seed=subjects.seed,
            progress=progress,
        )
    except UserError as error:
        if str(path) not in str(error):  # not about what the file holds
            raise
        raise UserError(f"{error}; --fresh measures anew, --out writes into another folder") from error


def _largest_eigenvalues(subjects: Subjects) -> dict[str, dict[str, float]]:
    """Read what stands on the figure, where it was measured before."""
    found = {}
    for name, entry in read_measures(subjects.folder, subjects.identity)[0].items():
        rows = {row["name"]: row["value"] for row in entry["sharpness"]["rows"]}
        if name in subjects.models and entry["seed"] == subjects.seed and rows.get("lambda_max") is not None:
            found[name] = rows["lambda_max"]
    return {"lambda_max": found} if found else {}
