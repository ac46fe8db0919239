"""m-sharpness: the mean rise of the loss over disjoint micro-batches of m samples, each with an eps of its own.

Foret et al., ICLR 2021, section 4.1: with one perturbation for each m samples, found by SAM's step on those samples
alone. m = 1 is the strictest; m = all samples is the worst case of one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatwise.ascent import Ball
from flatwise.batching import count, narrow
from flatwise.measure.data import Part
from flatwise.measure.problem import Problem
from flatwise.measure.unchanged import Displaced


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of m samples.

    Attributes:
        parts: it may reach over batches, and be evaluated in several parts.
    """

    parts: tuple[Part, ...]

    @property
    def samples(self) -> int:
        """How many samples are in it; m, but for the last."""
        return sum(part.samples for part in self.parts)


def micro_batches(problem: Problem, m: int, micro_batch_size: int | None) -> list[MicroBatch]:
    """Cut the samples of this process, in their order, into micro-batches of m.

    Args:
        problem: the batches.
        m: how many samples share a perturbation; the last micro-batch may have fewer.
        micro_batch_size: how many are evaluated at once; None: as many as one batch has.

    Returns:
        The micro-batches.
    """
    found: list[MicroBatch] = []
    parts: list[Part] = []
    missing, number = m, 0
    for batch in problem.batches:
        samples, start = count(batch), 0
        while start < samples:
            size = min(missing, samples - start, micro_batch_size or samples)
            piece = batch if size == samples else narrow(batch, start, start + size)
            parts.append(Part(piece, size, number))
            missing, number, start = missing - size, number + 1, start + size
            if not missing:
                found.append(MicroBatch(tuple(parts)))
                parts, missing = [], m
    return [*found, MicroBatch(tuple(parts))] if parts else found


def spread_out(entries: list[MicroBatch], limit: int | None) -> list[MicroBatch]:
    """Take at most ``limit`` micro-batches, evenly spaced.

    Args:
        entries: all.
        limit: how many; None: all.

    Returns:
        Those taken.
    """
    if limit is None or len(entries) <= limit:
        return entries
    return [entries[index * len(entries) // limit] for index in range(limit)]


@torch.no_grad()
def gaps(problem: Problem, ball: Ball, rho: float, entries: list[MicroBatch], tick: Callable[[], object]) -> Tensor:
    """Climb one step on each micro-batch, and see how much its loss rises.

    Args:
        problem: the loss; open.
        ball: shape of the ball.
        rho: its radius.
        entries: the micro-batches.
        tick: called after each unit of work: a step, a pair, a micro-batch.

    Returns:
        The rise of each, shape (micro-batches,), float64; NaN where the gradient is not finite.
    """
    rises = torch.empty(len(entries), dtype=torch.float64)
    with Displaced(problem.params) as displaced:
        for index, entry in enumerate(entries):
            parts = list(entry.parts)
            shares = torch.tensor([part.samples / entry.samples for part in parts], dtype=torch.float64)
            before, gradient = problem.gradient(parts)
            if bool(torch.isfinite(gradient).all()):
                grads = problem.shaped(gradient)
                displaced.move(ball.perturbation(displaced.origin, grads, [rho] * len(grads)))
                rises[index] = problem.losses(parts) @ shares - before
                displaced.restore()
            else:
                rises[index] = math.nan
            tick()
    return rises
