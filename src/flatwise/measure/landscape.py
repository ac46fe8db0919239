"""The loss on a line or plane through the weights: ``L(w + a d1 + b d2)``, for one model or several.

What is compared is measured alike: the same samples, the same coordinates, the same draws. Points are written to a file
as they come, a plane is refined only where the loss bends (``refine.py``), and the result says which points were
evaluated. A plane is a cut of two dimensions through a space of very many: it misses what lies beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.ascent import Ball
from flatwise.errors import UserError
from flatwise.measure.data import read_batches
from flatwise.measure.directions import Normalize
from flatwise.measure.landscape_result import UNKNOWN, Landscape
from flatwise.measure.problem import LossFn, Mode, Problem
from flatwise.measure.result import Cost
from flatwise.measure.select import Parameters
from flatwise.measure.sheet import BatchNorm, Sheet, norms_of
from flatwise.measure.spans import Aim, Directions, Span, span_of
from flatwise.measure.survey import Survey, fingerprint_of
from flatwise.measure.trajectory import Trajectory, TrajectoryRecorder

Axis = tuple[float, float]

SMALLEST = 9
"""Points on an axis below which there is nothing to refine."""


def landscape(
    model: Module | Mapping[str, Module],
    loss_fn: LossFn,
    data: Any,
    *,
    directions: Directions = "random",
    dimensions: int | None = None,
    extent: float | Sequence[float] | Sequence[Axis] | None = None,
    points: int | Sequence[int] = 25,
    normalize: Normalize = "filter",
    biases: bool = False,
    orthogonalize: bool = False,
    scale: Literal["own", "shared"] = "own",
    batch_norm: BatchNorm = "recompute",
    rho: float = 0.05,
    ball: Ball | None = None,
    through: Any = None,
    trajectory: Trajectory | TrajectoryRecorder | None = None,
    refine: bool = True,
    tolerance: float = 0.02,
    path: str | Path | None = None,
    annotate: Mapping[str, Any] | None = None,
    parameters: Parameters = None,
    mode: Mode = "eval",
    micro_batch_size: int | None = None,
    seed: int = 0,
    process_group: Any = None,
    progress: bool = True,
) -> Landscape:
    """Measure the loss on a line or plane through the weights.

    Args:
        model: a model, or several by name, which are compared on the same samples.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        data: one batch, or an iterable of batches, read once.
        directions: ``"random"``: Gaussian, scaled as ``normalize`` says; models with the same parameters get the same
            draws. ``"sam"``: the perturbation of SAM (in a plane with a random direction of its length). ``"hessian"``:
            the eigenvectors of the largest eigenvalues, of each model its own. ``"checkpoints"``: to the weights in
            ``through``. ``"pca"``: the principal components of ``trajectory``. Or a sequence of one or two directions,
            each ``"random"``, ``"sam"``, ``"hessian"``, or tensors as in a state dict, taken as they are.
        dimensions: 1: a line; 2: a plane; None: as usual for the directions.
        extent: the coordinates go from ``-extent`` to ``extent``; or from low to high where pairs are given. One for
            all axes, or one for each. None: 1, or what the directions need.
        points: on each axis; an odd number has the centre among them.
        normalize: how random directions are scaled: ``"filter"`` (Li et al., NeurIPS 2018), ``"layer"`` or None.
        biases: whether random directions move parameters of one dimension (biases, batch normalisation).
        orthogonalize: make the second direction orthogonal to the first, after both were scaled; it keeps its length,
            no longer exactly that of each filter.
        scale: ``"own"``: each model's weights scale the random directions. ``"shared"``: the first model's do.
        batch_norm: ``"recompute"``: gather running statistics anew at every point, by a second forward pass.
            ``"frozen"``: keep those of the model, which fit other weights badly. ``"batch"``: statistics of each part.
        rho: radius of the SAM perturbation.
        ball: its shape; None: ``Ball()``.
        through: one set of weights for a line, two for a plane (modules or state dicts, in a list or by name), which
            goes through the model's weights, too. Where several models are given, those after the first stand for it.
        trajectory: what was recorded while the model was trained.
        refine: measure a plane of at least 9 x 9 points only where it bends, and predict the rest.
        tolerance: the largest error of a prediction, as a share of the range.
        path: a JSON file that is written while points are measured. Where it holds part of the same landscape, only
            the rest is measured; where it holds all, nothing is.
        annotate: numbers to be printed on the figure, such as ``{"lambda_max": {"sgd": 31.2, "sam": 12.0}}``.
        parameters: which parameters move.
        mode: ``"eval"``, ``"train"`` or ``"as is"``; batch normalisation obeys ``batch_norm``.
        micro_batch_size: evaluate at most so many samples at once.
        seed: of random directions and of what the loss draws.
        process_group: processes that each bring a share of the data; the first one writes the file.
        progress: whether a bar may be shown on a terminal.

    Returns:
        The landscape.

    Raises:
        UserError: for arguments that do not fit, or a file that holds something else.
    """
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance is a share of the range, between 0 and 1, got {tolerance!r}")
    if scale not in ("own", "shared"):
        raise UserError(f"scale must be 'own' or 'shared', got {scale!r}")
    models = dict(model) if isinstance(model, Mapping) else {"model": model}
    if not models:
        raise UserError("there is no model: pass a module, or modules by name")
    if directions == "checkpoints" and len(models) > 1 and through is None:
        through = {name: entry for number, (name, entry) in enumerate(models.items()) if number}
        models = dict(list(models.items())[:1])
    if directions in ("checkpoints", "pca") and len(models) > 1:
        raise UserError(f"directions={directions!r} is a place in the weight space of one model, got {len(models)}")
    batches = read_batches(data)
    problems = [
        Problem(
            entry,
            loss_fn,
            iter(batches),
            parameters=parameters,
            mode=mode,
            micro_batch_size=micro_batch_size,
            seed=seed,
            process_group=process_group,
        )
        for entry in models.values()
    ]
    aim = Aim(
        directions,
        dimensions,
        normalize,
        biases,
        orthogonalize,
        scale,
        seed,
        ball or Ball(),
        rho,
        through,
        trajectory,
    )
    spans = [
        span_of(aim, problem, problems[0], name=name, progress=progress)
        for name, problem in zip(models, problems, strict=True)
    ]
    axes = _axes(spans[0], extent, points)
    sheets = [Sheet(p, s.vectors, batch_norm) for p, s in zip(problems, spans, strict=True)]
    shortest = min(map(len, axes))
    refines = refine and len(axes) == 2 and shortest >= SMALLEST
    start = _blank(tuple(models), axes, aim, sheets, spans, annotate or {}, tolerance if refines else None)
    survey = Survey(start, sheets, spans[0], None if path is None else Path(path))
    survey.everything(progress=progress)
    return survey.seen


def _axes(span: Span, extent: Any, points: int | Sequence[int]) -> tuple[tuple[float, ...], ...]:
    count = len(span.vectors)
    sizes = [points] * count if isinstance(points, int) else list(points)
    if extent is None:
        limits: list[Any] = list(span.reach)
    elif isinstance(extent, int | float):
        limits = [extent] * count
    else:
        limits = list(extent)
    if len(sizes) != count or any(not isinstance(size, int) or size < 2 for size in sizes):
        raise UserError(f"points must be a whole number >= 2, or one for each of the {count} axes, got {points!r}")
    if len(limits) != count:
        raise UserError(
            f"extent must be one number, or one number or pair for each of the {count} axes, got {extent!r}"
        )
    axes = []
    for limit, size in zip(limits, sizes, strict=True):
        low, high = (-limit, limit) if isinstance(limit, int | float) else map(float, limit)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"extent must be a positive number, or pairs from low to high, got {extent!r}")
        axes.append(tuple(low + (high - low) * (number / (size - 1)) for number in range(size)))
    return tuple(axes)


def _blank(
    names: tuple[str, ...],
    axes: tuple[tuple[float, ...], ...],
    aim: Aim,
    sheets: Sequence[Sheet],
    spans: Sequence[Span],
    annotate: Mapping[str, Any],
    tolerance: float | None,
) -> Landscape:
    """Make the landscape of which no point is known yet."""
    shape = (len(names), *map(len, axes))
    batch_norm = sheets[0].batch_norm if any(norms_of(sheet.problem) for sheet in sheets) else "none"
    conditions = sheets[0].problem.conditions()
    return Landscape(
        names=names,
        axes=axes,
        labels=spans[0].labels,
        values=torch.full(shape, math.nan, dtype=torch.float64),
        states=torch.full(shape, UNKNOWN, dtype=torch.uint8),
        standard_errors=torch.full(shape, math.nan, dtype=torch.float64),
        directions=spans[0].kinds,
        norms=tuple(tuple(float(v.double().norm()) for v in span.vectors) for span in spans),
        cosines=tuple(_cosine(*span.vectors) for span in spans if len(span.vectors) == 2),
        normalize=aim.normalize if any(kind.startswith("random") for kind in spans[0].kinds) else None,
        biases=aim.biases,
        orthogonalize=aim.orthogonalize,
        scale=aim.scale,
        batch_norm=batch_norm,
        seed=aim.seed,
        tolerance=tolerance,
        error_seen=(None,) * len(names),
        explained=spans[0].explained,
        marks=(),
        track=None,
        annotate={**_found(names, spans), **annotate},
        fingerprint=fingerprint_of(sheets, (names, axes, batch_norm, tolerance, conditions, spans[0].kinds, aim.seed)),
        complete=False,
        conditions=conditions,
        cost=Cost(0.0, 0.0),
    )


def _cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))


def _found(names: Sequence[str], spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Turn the numbers that were found for each model into numbers by model."""
    return {key: {name: span.numbers[key] for name, span in zip(names, spans, strict=True)} for key in spans[0].numbers}
