"""Which line or plane: from what was asked for to vectors in the space of the weights, for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.ascent import Ball
from flatwise.errors import UnknownNameError, UserError
from flatwise.measure.directions import Normalize, as_vector, normalised, orthogonalised, random_direction
from flatwise.measure.hessian import hessian_eigenvalues
from flatwise.measure.problem import Problem
from flatwise.measure.result import digits
from flatwise.measure.trajectory import Trajectory, TrajectoryRecorder, principal

Kind = Literal["random", "sam", "hessian", "checkpoints", "pca"]
Directions = Kind | Sequence[Any]
"""A kind; or for each direction its kind ("random", "sam" or "hessian") or what it is, as weights may be given."""


@dataclass(frozen=True)
class Span:
    """A line or plane through the weights of a model.

    Attributes:
        vectors: the directions, shape (weights,) each.
        kinds: what each is, for the record.
        labels: what each axis is called.
        reach: for each axis, how far it goes by default.
        places: weights with a name.
        steps: weights that a training run went through.
        explained: for each direction, the share of the variance of those.
        numbers: what was found on the way, such as eigenvalues.
    """

    vectors: tuple[Tensor, ...]
    kinds: tuple[str, ...]
    labels: tuple[str, ...]
    reach: tuple[tuple[float, float], ...]
    places: tuple[tuple[str, Tensor], ...] = ()
    steps: tuple[tuple[int, Tensor], ...] = ()
    explained: tuple[float, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Aim:
    """How directions are to be made.

    Attributes:
        directions: what was asked for.
        dimensions: 1 or 2; None: as many as usual for the kind.
        normalize: how random directions are scaled.
        biases: whether they move parameters of one dimension.
        orthogonalize: whether the second is made orthogonal to the first, after scaling.
        scale: whose weights scale them.
        seed: of draws.
        ball: of the SAM perturbation.
        rho: its radius.
        through: the weights that a line or plane goes through, besides the model's.
        trajectory: the recorded weights of a training run.
    """

    directions: Directions
    dimensions: int | None
    normalize: Normalize
    biases: bool
    orthogonalize: bool
    scale: Literal["own", "shared"]
    seed: int
    ball: Ball
    rho: float
    through: Any = None
    trajectory: Trajectory | TrajectoryRecorder | None = None

    def entries(self) -> list[Any]:
        """Say what each direction is to be.

        Returns:
            One entry for each.

        Raises:
            UnknownNameError: for a kind that there is not.
            UserError: for a number of directions that there is not.
        """
        asked, wanted = self.directions, self.dimensions
        if isinstance(asked, str):
            if asked not in ("random", "sam", "hessian"):
                raise UnknownNameError("kind of directions", asked, ("random", "sam", "hessian", "checkpoints", "pca"))
            count = wanted or (1 if asked == "sam" else 2)
            asked = ["sam", "random"][:count] if asked == "sam" else [asked] * count
        entries = list(asked)
        if len(entries) not in (1, 2) or wanted not in (None, len(entries)):
            raise UserError(f"a landscape has 1 or 2 directions, got {len(entries)} with dimensions={wanted!r}")
        return entries


def span_of(aim: Aim, problem: Problem, first: Problem, *, name: str, progress: bool) -> Span:
    """Make the directions of one model.

    Args:
        aim: what is wanted.
        problem: of the model.
        first: of the first model.
        name: of the model.
        progress: whether a bar may be shown.

    Returns:
        The line or plane.

    Raises:
        UnknownNameError: for a kind that there is not.
    """
    if aim.directions == "checkpoints":
        return _through(aim, problem, name)
    if aim.directions == "pca":
        return _of_trajectory(aim, problem)
    vectors: list[Tensor] = []
    kinds: list[str] = []
    labels: list[str] = []
    entries = aim.entries()
    order = [number for number, entry in enumerate(entries) if isinstance(entry, str) and entry == "hessian"]
    numbers: dict[str, float] = {}
    curved = _eigenvectors(problem, len(order), numbers, progress=progress) if order else []
    for number, entry in enumerate(entries):
        if not isinstance(entry, str):
            vectors.append(as_vector(problem, entry, f"direction {number + 1}"))
            kinds.append("given")
            labels.append(f"given direction {number + 1}")
        elif entry == "random":
            vectors.append(_random(aim, problem, first, number))
            scaled = "" if aim.normalize is None else f", {aim.normalize}-normalised"
            kinds.append(f"random{scaled}")
            labels.append(f"random direction {number + 1}")
        elif entry == "sam":
            vectors.append(sam_perturbation(problem, aim.ball, aim.rho))
            kinds.append(f"SAM perturbation, rho={aim.rho:g}")
            labels.append(f"SAM perturbation (1 = rho = {aim.rho:g})")
        elif entry == "hessian":
            place = order.index(number)
            vectors.append(curved[place])
            kinds.append(f"Hessian eigenvector {place + 1}")
            labels.append(f"Hessian eigenvector {place + 1}")
        else:
            raise UnknownNameError("kind of direction", entry, ("random", "sam", "hessian"))
    if aim.directions == "sam" and len(vectors) == 2:
        # Beside the perturbation, a direction of the same length shows the same scale.
        vectors[1] = vectors[1] * (vectors[0].norm() / vectors[1].norm())
        vectors = orthogonalised(vectors)
        kinds[1], labels[1] = "random, as long as the first", f"random direction of length {aim.rho:g}"
    elif aim.orthogonalize:
        vectors = orthogonalised(vectors)
    return Span(tuple(vectors), tuple(kinds), tuple(labels), ((-1.0, 1.0),) * len(vectors), numbers=numbers)


def _random(aim: Aim, problem: Problem, first: Problem, number: int) -> Tensor:
    scaling = problem.params
    if aim.scale == "shared":
        if [(n, p.shape) for n, p in zip(first.names, first.params, strict=True)] != [
            (n, p.shape) for n, p in zip(problem.names, problem.params, strict=True)
        ]:
            raise UserError("scale='shared' needs models with the same parameters; pass scale='own'")
        scaling = first.params
    drawn = random_direction(problem, number, aim.seed)
    return problem.flat(normalised(drawn, scaling, aim.normalize, biases=aim.biases))


def sam_perturbation(problem: Problem, ball: Ball, rho: float) -> Tensor:
    """Climb as SAM does: the perturbation of the ball, to first order the worst one.

    Args:
        problem: the model, the loss and the samples.
        ball: its shape.
        rho: its radius.

    Returns:
        Shape (weights,).

    Raises:
        UserError: if the gradient is zero or not finite.
    """
    with problem.open():
        _, gradient = problem.gradient()
    weights, grads = list(problem.params), problem.shaped(gradient)
    climb = ball.climb([weights], [grads])
    scale = rho * float(climb.scale)
    if scale == 0:
        raise UserError("there is no SAM perturbation: the gradient is zero, or not finite")
    return problem.flat(grads) * scale


def _eigenvectors(problem: Problem, count: int, numbers: dict[str, float], *, progress: bool) -> list[Tensor]:
    """Find the directions in which the loss bends most, and note how much."""
    found = hessian_eigenvalues(
        problem.model,
        problem.loss_fn,
        iter(problem.batches),
        count,
        keep_vectors=True,
        parameters=problem.names,
        mode=problem.mode,
        micro_batch_size=problem.asked,
        seed=problem.seed,
        process_group=problem.group,
        progress=progress,
    )
    problem.gradient_evaluations += found.cost.gradient_evaluations
    assert found.vectors is not None
    vectors = []
    for number, row in enumerate(found.vectors):
        numbers[f"lambda_{number + 1}"] = found.values[number]
        if not found.converged[number]:
            residual = digits(found.residuals[number], None)
            problem.note(f"Hessian eigenvector {number + 1} did not converge: its residual is {residual}")
        vector = row.to(device=problem.device, dtype=problem.dtype)
        vectors.append(vector * torch.sign(vector[vector.abs().argmax()]))
    return vectors


def _through(aim: Aim, problem: Problem, model: str) -> Span:
    """Lay a line through two sets of weights, or a plane through three; the model's own come first."""
    given = aim.through
    if isinstance(given, Module | Tensor) or (isinstance(given, Mapping) and set(problem.names) <= set(given)):
        given = [given]  # one set of weights
    named = dict(given) if isinstance(given, Mapping) else {f"checkpoint {n + 1}": w for n, w in enumerate(given or [])}
    if len(named) not in (1, 2) or aim.dimensions not in (None, len(named)):
        raise UserError(
            f"directions='checkpoints' needs through= one other set of weights for a line, two for a plane, "
            f"got {len(named)} with dimensions={aim.dimensions!r}"
        )
    here = problem.flat(problem.params)
    others = [as_vector(problem, weights, name) for name, weights in named.items()]
    places = ((model, here), *zip(named, others, strict=True))
    steps = [other - here for other in others]
    if len(steps) == 1:
        kind = f"from {model} to {next(iter(named))}"
        label = f"{kind} (0 to 1)"
        return Span((_not_zero(steps[0]),), (kind,), (label,), ((-0.25, 1.25),), places=places)
    # Orthonormal, so that a distance on the picture is one between weights (Garipov et al., NeurIPS 2018).
    first, second = orthogonalised([_not_zero(step) for step in steps])
    vectors = (first / first.norm(), second / second.norm())
    kinds = tuple(f"through {name}" for name in named)
    labels = ("distance between weights", "distance between weights")
    return Span(vectors, kinds, labels, reach_of(coordinates_of(here, vectors, [here, *others]), 0.25), places=places)


def _not_zero(step: Tensor) -> Tensor:
    if not bool((step != 0).any()):
        raise UserError("two of the checkpoints have the same weights: there is no line through them")
    return step


def _of_trajectory(aim: Aim, problem: Problem) -> Span:
    """Lay the plane in which most of the way of a training run lies through the model's weights."""
    given = aim.trajectory
    recorded = given.trajectory if isinstance(given, TrajectoryRecorder) else given
    if recorded is None:
        raise UserError("directions='pca' needs trajectory= a Trajectory, or the TrajectoryRecorder of the training")
    rows = [
        as_vector(problem, weights, f"the record of step {step}")
        for step, weights in zip(recorded.steps, recorded.weights, strict=True)
    ]
    found, shares = principal(rows, aim.dimensions or 2)
    vectors = tuple(vector.to(device=problem.device, dtype=problem.dtype) for vector in found)
    kinds = tuple(f"principal component {n + 1} of the training run" for n in range(len(vectors)))
    labels = tuple(f"component {n + 1} ({100 * share:.1f} %)" for n, share in enumerate(shares))
    here = problem.flat(problem.params)
    reach = reach_of(coordinates_of(here, vectors, [here, *rows]), 0.15)
    return Span(vectors, kinds, labels, reach, steps=tuple(zip(recorded.steps, rows, strict=True)), explained=shares)


def coordinates_of(centre: Tensor, vectors: Sequence[Tensor], weights: Sequence[Tensor]) -> list[tuple[float, ...]]:
    """Project weights.

    Args:
        centre: where the coordinates are zero.
        vectors: one direction, or two.
        weights: shape (weights,) each.

    Returns:
        For each, the coordinates of the nearest point of the line or plane.
    """
    basis = torch.stack([vector.double() for vector in vectors])
    gram = basis @ basis.T
    steps = torch.stack([entry.double() - centre.double() for entry in weights])
    return [tuple(row) for row in torch.linalg.solve(gram, basis @ steps.T).T.tolist()]


def reach_of(coordinates: Sequence[tuple[float, ...]], margin: float) -> tuple[tuple[float, float], ...]:
    """Say how far the axes must go to show places.

    Args:
        coordinates: of the places.
        margin: what is left around them, as a share of the longer side.

    Returns:
        Low and high, for each axis.
    """
    ends = [(min(row), max(row)) for row in zip(*coordinates, strict=True)]
    extra = margin * max(high - low for low, high in ends)
    return tuple((low - extra, high + extra) for low, high in ends)
