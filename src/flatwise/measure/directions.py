"""Directions in the space of the weights, along which a landscape is drawn.

A random direction says something about a network only where its size fits the weights: a ReLU network is the same
function after one layer is halved and the next doubled. Li et al. (NeurIPS 2018, section 4) scale each filter f of a
Gaussian direction d to the length of the same filter of the weights w,

    d_f <- d_f ||w_f|| / (||d_f|| + 1e-10),

where the filters are the slices of the first dimension, and set parameters of one dimension (biases, batch
normalisation) to zero, since they are no filters. Draws depend on the seed, the number of the direction and the name of
the parameter alone: networks with the same parameters get the same draw, and each scales it to its own filters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from flatwise.errors import UserError, nearest
from flatwise.measure.problem import Problem
from flatwise.seeds import stream

Normalize = Literal["filter", "layer"] | None

_EPS = 1e-10
"""As in the code of Li et al."""


def random_direction(problem: Problem, number: int, seed: int) -> list[Tensor]:
    """Draw a Gaussian direction, the same for every model whose parameters have these names and shapes.

    Args:
        problem: whose parameters.
        number: 0 for the first direction, 1 for the second.
        seed: of the draw.

    Returns:
        One tensor for each parameter.
    """
    drawn = []
    for name, p in zip(problem.names, problem.params, strict=True):
        draws = stream(seed, "landscape direction", number, name)
        drawn.append(torch.randn(p.shape, generator=draws, dtype=torch.float64).to(problem.device, problem.dtype))
    return drawn


def normalised(
    direction: Sequence[Tensor], weights: Sequence[Tensor], how: Normalize = "filter", *, biases: bool = False
) -> list[Tensor]:
    """Scale a direction to the size of the weights (Li et al., NeurIPS 2018).

    Args:
        direction: one tensor for each parameter.
        weights: of the same shapes.
        how: ``"filter"``: each slice of the first dimension gets the length of the weights' slice. ``"layer"``: each
            tensor gets the length of the weights' tensor. None: the direction stays.
        biases: False sets parameters with fewer than two dimensions to zero. True treats them as the others.

    Returns:
        The scaled direction, in the dtype of the direction.

    Raises:
        UserError: if the shapes differ, or nothing is left of the direction.
    """
    if how not in ("filter", "layer", None):
        raise UserError(f"normalize must be 'filter', 'layer' or None, got {how!r}")
    scaled = []
    for d, w in zip(direction, weights, strict=True):
        if d.shape != w.shape:
            raise UserError(f"a direction has a tensor of shape {tuple(d.shape)} for weights of {tuple(w.shape)}")
        if w.dim() <= 1 and not biases:
            scaled.append(torch.zeros_like(d))
        elif how is None:
            scaled.append(d.clone())
        else:
            rows = (w.shape[0], -1) if how == "filter" and w.dim() else (1, -1)
            lengths = w.detach().to(d).reshape(rows).norm(dim=1, keepdim=True)
            flat = d.reshape(rows)
            scaled.append((flat * (lengths / (flat.norm(dim=1, keepdim=True) + _EPS))).reshape(d.shape))
    if not any(bool((d != 0).any()) for d in scaled):
        raise UserError(
            "nothing is left of the direction: every parameter has one dimension, or is zero; "
            "pass biases=True, or normalize=None"
        )
    return scaled


def orthogonalised(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Make vectors orthogonal to those before them; each keeps its length.

    Args:
        vectors: shape (weights,) each.

    Returns:
        The first as it is, and what is left of each of the others.

    Raises:
        UserError: if one is a combination of those before it.
    """
    found: list[Tensor] = []
    for vector in vectors:
        rest = vector.double()
        for _ in range(2):  # the second round takes away what rounding left
            for earlier in found:
                unit = earlier.double()
                rest = rest - unit * (rest @ unit) / (unit @ unit)
        if float(rest.norm()) <= 1e-6 * float(vector.norm()):
            raise UserError("the directions span no plane: one is a multiple of the other, or zero")
        found.append((rest * (vector.double().norm() / rest.norm())).to(vector.dtype))
    return found


def as_vector(problem: Problem, given: Any, what: str) -> Tensor:
    """Read weights, or a direction, as a caller may hold it.

    Args:
        problem: whose parameters are meant.
        given: a module, a mapping of names to tensors such as a state dict (more names than needed are fine), a
            sequence of tensors, one for each parameter, or one vector.
        what: what it is, for the message.

    Returns:
        Shape (weights,), a copy.

    Raises:
        UserError: if it does not fit the parameters.
    """
    if isinstance(given, Tensor):
        if given.numel() != problem.weights or given.dim() != 1:
            raise UserError(f"{what} has shape {tuple(given.shape)}, the model has {problem.weights} weights")
        return given.detach().to(device=problem.device, dtype=problem.dtype, copy=True)
    if isinstance(given, Module):
        given = dict(given.named_parameters())
    if isinstance(given, Mapping):
        for name in problem.names:
            if name not in given:
                raise UserError(f"{what} has no parameter {name!r}{nearest(name, given)}")
        given = [given[name] for name in problem.names]
    tensors = list(given)
    shapes = [tuple(p.shape) for p in problem.params]
    if [tuple(t.shape) for t in tensors] != shapes:
        raise UserError(f"{what} has other shapes than the {len(shapes)} parameters of the model")
    return problem.flat(tensors)
