"""Worst case: how much the loss rises at the highest point found in a ball around w.

The ball is ``||T^-1 eps||_p <= rho``, T = 1 or T = |w| + eta. One step is SAM's (Foret et al., ICLR 2021, eq. 2). More
steps are projected ascent: each has the length rho, along the dual direction of the gradient where it stands, and is
followed by the projection onto the ball (App. C.6 of the paper). The highest point met counts, so that n steps never
say less than one. What an ascent finds is a lower bound of the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatwise.ascent import Ball, ProjectedAscent
from flatwise.measure.problem import Problem
from flatwise.measure.result import Cost
from flatwise.measure.unchanged import Displaced
from flatwise.seeds import stream
from flatwise.weights import Displacement, Piece


@dataclass(frozen=True)
class Ascended:
    """What an ascent met.

    Attributes:
        losses: of each part of the data, at the highest point, shape (parts,), float64.
        steps: after how many steps it was met.
        cost: of this, beyond what was found before.
        gradient: where one step led, if it was computed; shape (weights,).
    """

    losses: Tensor
    steps: int
    cost: Cost
    gradient: Tensor | None = None


def climb(
    problem: Problem,
    ball: Ball,
    rho: float,
    steps: int,
    gradient: Tensor,
    base: Tensor,
    tick: Callable[[], object],
) -> list[Ascended]:
    """Search a ball for a high loss.

    Args:
        problem: the loss; open.
        ball: shape of the ball.
        rho: its radius.
        steps: how many, n >= 1.
        gradient: at w, shape (weights,).
        base: losses of the parts at w.
        tick: called after each unit of work: a step, a pair, a micro-batch.

    Returns:
        What one step met, and what all steps met where ``steps > 1``. Losses are NaN where the gradient is not finite:
        then there is no direction.
    """
    norm = float(torch.linalg.vector_norm(gradient))
    if not math.isfinite(norm):
        return [Ascended(torch.full_like(base, math.nan), 0, problem.cost()) for _ in range(min(steps, 2))]
    sizes = torch.tensor([part.samples for part in problem.parts], dtype=torch.float64)
    with Displaced(problem.params) as displaced:
        ascent = ProjectedAscent(ball, Displacement())
        if norm == 0:  # nothing is uphill: one step stays; more of them start into a random direction
            first = Ascended(base, 0, problem.cost())
            _advance(problem, ascent, rho, _random_like(problem, gradient))
        else:
            _advance(problem, ascent, rho, gradient)
            first = Ascended(problem.losses(), 1, problem.cost())
        if steps == 1:
            return [first]
        best, best_loss, weights = 0, -math.inf, problem.params
        for number in range(1, steps):
            loss, gradient = problem.gradient()
            if number == 1 and norm > 0:
                first = replace(first, gradient=gradient)
            if loss > best_loss:
                best, best_loss, weights = number, loss, [p.detach().clone() for p in problem.params]
            _advance(problem, ascent, rho, gradient)
            tick()
        losses, met = problem.losses(), steps
        if not _mean(problem, losses, sizes) >= best_loss:
            displaced.place(weights)
            losses, met = problem.losses(), best
        # Rounding differs with and without a graph; the promise is about the numbers that are shown.
        if not _mean(problem, losses, sizes) >= _mean(problem, first.losses, sizes):
            losses, met = first.losses, first.steps
    return [first, Ascended(losses, met, problem.cost())]


def turning(problem: Problem, ball: Ball, rho: float, gradient: Tensor, ahead: Tensor | None) -> Tensor:
    """Say how each part of the data moves the rise of one step by turning eps.

    ``eps(g)`` depends on the samples through the gradient g. To first order a part b, whose own gradient is g_b, adds
    ``u^T (g_b - g)`` to its paired difference, ``u = (d eps / d g)^T g(w + eps)``; the mean of it over the parts is 0.
    At a maximum over the ball u vanishes, so what many steps found needs no such term, and neither does p = inf, where
    eps does not turn.

    Args:
        problem: the loss; open.
        ball: shape of the ball.
        rho: its radius.
        gradient: g, at w; not zero.
        ahead: the gradient at w + eps; None: it is computed.

    Returns:
        Shape (parts,), float64, on the CPU.
    """
    weights = [p.detach() for p in problem.params]
    with torch.enable_grad():
        grads = [g.clone().requires_grad_() for g in problem.shaped(gradient)]
        eps = ball.perturbation(weights, grads, [rho] * len(grads))
    if ahead is None:
        with Displaced(problem.params) as displaced:
            displaced.move([e.detach() for e in eps])
            _, ahead = problem.gradient()
    u = problem.flat(torch.autograd.grad(eps, grads, problem.shaped(ahead)))
    moved = [torch.dot(u.double(), (problem.gradient([part])[1] - gradient).double()) for part in problem.parts]
    return torch.stack(moved).cpu()


def _advance(problem: Problem, ascent: ProjectedAscent, rho: float, gradient: Tensor) -> None:
    grads = [g.clone() for g in problem.shaped(gradient)]
    ascent.advance([[Piece(p, g, p, g) for p, g in zip(problem.params, grads, strict=True)]], [rho])


def _random_like(problem: Problem, vector: Tensor) -> Tensor:
    draws = torch.randn(vector.shape, generator=stream(problem.seed, "ascent"), dtype=vector.dtype)
    return draws.to(vector.device)


def _mean(problem: Problem, losses: Tensor, sizes: Tensor) -> float:
    return float(problem.summed((losses @ sizes / problem.samples).to(problem.device)))
