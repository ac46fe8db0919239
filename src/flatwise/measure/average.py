"""Average case: how much the loss rises, on average, under Gaussian noise on the weights.

``eps = s T z`` with z standard normal and ``s = rho / sqrt(k)``, where k counts the weights that T lets move, so that
``E ||T^-1 eps||_2^2 = rho^2``: the noise has the size of the ball's radius. To second order the rise is
``s^2 / 2 * tr(T H T)``; for T = 1 that is ``rho^2 / 2`` times the mean eigenvalue.
Every z is used together with -z (antithetic pairs): what is odd in eps, above all the slope, cancels exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flatwise.ascent import Ball
from flatwise.measure.problem import Problem
from flatwise.measure.unchanged import Displaced
from flatwise.seeds import stream


def noise_scale(problem: Problem, ball: Ball, rho: float) -> float:
    """Return the standard deviation s of ``T^-1 eps`` at which ``E ||T^-1 eps||_2 ** 2 = rho ** 2``.

    Args:
        problem: the weights.
        ball: T.
        rho: the radius.

    Returns:
        ``rho / sqrt(k)``; 0 where T lets nothing move.
    """
    moving = problem.weights
    if ball.adaptive:
        with torch.no_grad():
            moving = sum(int((t > 0).sum()) for t in ball.scaling(problem.params))
    return rho / math.sqrt(moving) if moving else 0.0


@torch.no_grad()
def under_noise(
    problem: Problem, ball: Ball, scale: float, pairs: int, tick: Callable[[], object], stream_name: str = "noise"
) -> Tensor:
    """Evaluate the loss under antithetic pairs of Gaussian noise, the same for all samples.

    Args:
        problem: the loss; open.
        ball: T.
        scale: the standard deviation s of ``T^-1 eps``.
        pairs: how many pairs z, -z.
        tick: called after each unit of work: a step, a pair, a micro-batch.
        stream_name: which draws of the seed.

    Returns:
        The mean loss of each pair on each part, shape (pairs, parts), float64.
    """
    losses = torch.zeros(pairs, len(problem.parts), dtype=torch.float64)
    with Displaced(problem.params) as displaced:
        scales = ball.scaling(displaced.origin) if ball.adaptive else None
        for pair in range(pairs):
            draws = torch.randn(problem.weights, generator=stream(problem.seed, stream_name, pair), dtype=problem.dtype)
            noise = problem.shaped(draws.to(problem.device))
            if scales is not None:
                noise = list(torch._foreach_mul(noise, scales))
            for sign in (1, -1):
                displaced.move(noise, sign * scale)
                losses[pair] += problem.losses() / 2
            tick()
    return losses
