"""Which line or plane: from what was asked for to vectors in the space of the weights, for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from flatwise.ascent import Ball
from flatwise.errors import UnknownNameError, UserError
from flatwise.measure.directions import Normalize, as_vector, normalised, orthogonalised, random_direction
from flatwise.measure.problem import Problem

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
        centre: where the coordinates are zero; None: the model's weights.
        marks: places with a name, and their coordinates.
        reach: for each axis, how far it goes by default.
        explained: for each direction, the share of a variance.
    """

    vectors: tuple[Tensor, ...]
    kinds: tuple[str, ...]
    labels: tuple[str, ...]
    reach: tuple[tuple[float, float], ...]
    centre: Tensor | None = None
    marks: tuple[tuple[str, tuple[float, ...]], ...] = ()
    explained: tuple[float, ...] = field(default=())


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


def span_of(aim: Aim, problem: Problem, first: Problem, *, progress: bool) -> Span:
    """Make the directions of one model.

    Args:
        aim: what is wanted.
        problem: of the model.
        first: of the first model.
        progress: whether a bar may be shown.

    Returns:
        The line or plane.

    Raises:
        UnknownNameError: for a kind that there is not.
    """
    vectors: list[Tensor] = []
    kinds: list[str] = []
    labels: list[str] = []
    entries = aim.entries()
    for number, entry in enumerate(entries):
        if not isinstance(entry, str):
            vectors.append(as_vector(problem, entry, f"direction {number + 1}"))
            kinds.append("given")
            labels.append(f"given direction {number + 1}")
        elif entry == "random":
            vectors.append(_random(aim, problem, first, number))
            scaled = "" if aim.normalize is None else f", {aim.normalize}-normalised"
            kinds.append(f"random{scaled}")
            labels.append(f"random direction {number + 1}{scaled}")
        elif entry == "sam":
            vectors.append(sam_perturbation(problem, aim.ball, aim.rho))
            kinds.append(f"SAM perturbation, rho={aim.rho:g}")
            labels.append(f"SAM perturbation (1 = rho = {aim.rho:g})")
        else:
            raise UnknownNameError("kind of direction", entry, ("random", "sam", "hessian"))
    if entries[:1] == ["sam"] and entries[1:] == ["random"]:
        # Beside the perturbation, a direction of the same length shows the same scale.
        vectors[1] = vectors[1] * (vectors[0].norm() / vectors[1].norm())
        vectors = orthogonalised(vectors)
        kinds[1], labels[1] = "random, as long as the first", f"random direction of length {aim.rho:g}"
    elif aim.orthogonalize:
        vectors = orthogonalised(vectors)
    return Span(tuple(vectors), tuple(kinds), tuple(labels), ((-1.0, 1.0),) * len(vectors))


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
