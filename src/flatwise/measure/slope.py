"""The gradient at w, and how long it would be by sampling alone.

A gradient of few samples is long even at the minimum of the true loss: ``E |g|^2 = |E g|^2 + noise^2``. Where the norm
is little more than the noise, the first-order part of every worst case is about the samples, not about the minimum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatwise.measure.problem import BACKWARD, Problem


def gradient_and_noise(problem: Problem) -> tuple[Tensor, float]:
    """Evaluate the gradient, and the root mean square length of its sampling error.

    With shares s_b of the samples, ``noise^2 = B / (B - 1) sum_b s_b^2 |g_b - g|^2``, over the parts b.

    Args:
        problem: the loss; open.

    Returns:
        The gradient, shape (weights,), and the noise; NaN where there is one part.
    """
    total = torch.zeros(problem.weights, dtype=problem.dtype, device=problem.device)
    again = torch.zeros_like(total)
    sums = torch.zeros(3, dtype=torch.float64)
    used: set[int] = set()
    for part in problem.parts:
        with torch.enable_grad():
            loss = problem.loss_of(part)
        grads = problem.gradients_of(loss)
        used |= {number for number, g in enumerate(grads) if g is not None}
        problem.spend(part, BACKWARD)
        gradient, share = problem.flat(grads), problem.share(part)
        total.add_(gradient, alpha=share)
        again.add_(gradient, alpha=share**2)
        norm = float(torch.linalg.vector_norm(gradient, dtype=problem.dtype))
        sums += torch.tensor([share**2 * norm**2, share**2, 1.0], dtype=torch.float64)
    problem.say_used(used)
    total, again = problem.summed(total), problem.summed(again)
    squares, shares, parts = problem.summed(sums.to(problem.device)).tolist()
    if parts < 2:
        return total, math.nan
    along, length = float(torch.dot(total.double(), again.double())), float(total.double().square().sum())
    return total, math.sqrt(max(0.0, (squares - 2 * along + shares * length) * parts / (parts - 1)))
