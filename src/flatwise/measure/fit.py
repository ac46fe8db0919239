"""How the samples are cut for products: so that graphs fit into the memory, and so that a CPU is quick with them.

A CPU is slow with tensors of tens of megabytes: each is fetched from the system anew, page by page, and fits no
cache. The same batch in pieces is the same loss where the loss is a mean over samples. Whether it is, is seen, not
assumed: the loss and the gradient of the whole are compared with those of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flatwise.errors import UserError
from flatwise.measure.data import Part
from flatwise.measure.determinism import random_modules
from flatwise.measure.memory import SHARE, Need, free_memory, kept_parts, measured, need
from flatwise.measure.problem import Problem

QUICK = 2**26
"""Bytes of graphs and temporaries of a part that a CPU works on quickly."""

SAME = 100.0
"""Units of rounding: a sum over samples in another order is off by about ten."""


Evaluated = tuple[Tensor, Tensor]
"""A loss, 0-dim, and its gradient, shape (weights,)."""


class Fit:
    """Cuts the samples of a problem, and says whose graphs can be kept.

    Args:
        problem: open.
        use: builds the graphs of a part, and returns what multiplies with them.
        vectors: how many vectors there are besides.
        max_memory: bytes for all; None: a share of what is free, and never an error.

    Attributes:
        keep: numbers of the parts whose graphs are kept.
    """

    def __init__(
        self, problem: Problem, use: Callable[[Part], Callable[[], object]], vectors: int, max_memory: float | None
    ) -> None:
        self._problem, self._use, self._vectors, self._max_memory = problem, use, vectors, max_memory
        needs = need(problem.parts[0], use)
        held = (vectors + 4) * problem.weights * problem.dtype.itemsize
        self._budget = (SHARE * free_memory(problem.device) if max_memory is None else max_memory) - held
        self.keep = kept_parts(problem.parts, needs, self._budget)
        largest = max(part.samples for part in problem.parts)
        fitting = largest if self.keep else min(largest, needs.fitting(self._budget))
        wanted = problem.smallest(fitting)
        cut = wanted < problem.smallest(largest)
        if cut and (problem.batch_statistics or wanted < 1):
            self._too_small(needs, held, wanted)
        elif cut:
            needs = self._cut(wanted, needs)
            self.keep = kept_parts(problem.parts, needs, self._budget)
        self._needs = needs
        self._pieces = largest if cut else self._quick(needs)

    def _cut(self, wanted: int, needs: Need) -> Need:
        """Cut the batches, and look whether a part takes what a few samples let expect; return what it takes."""
        problem = self._problem
        while True:
            problem.cut(wanted)
            if self._max_memory is None:
                break
            part = problem.parts[0]
            kept, working = measured(part, self._use)
            needs = Need((0.0, kept / part.samples), (working, 0.0))
            # The most at once grows faster with the samples than a line through a few of them.
            fits = working <= self._budget
            smaller = problem.smallest(wanted if fits else max(1, int(0.95 * wanted * self._budget / working)))
            if smaller >= wanted:
                break
            wanted = smaller
        problem.note(f"evaluated {wanted} samples at a time, which is what the memory allows")
        return needs

    def _too_small(self, needs: Need, held: float, wanted: int) -> None:
        if self._max_memory is None:
            return  # the estimate may be wrong, and nobody asked for a limit
        if wanted < 1:
            raise UserError(
                f"max_memory={self._max_memory:.3g} bytes is too small: the graphs of one sample and {self._vectors} "
                f"vectors take about {sum(needs.working) + held:.3g}"
            )
        raise UserError(
            f"max_memory={self._max_memory:.3g} bytes allows {wanted} samples at a time, but batch normalisation makes "
            f"the loss depend on who is in a batch: pass micro_batch_size={wanted} if that is meant, or mode='eval'"
        )

    def _quick(self, needs: Need) -> int:
        """Return how many samples a CPU is quick with; all, where batches must stay as they are."""
        problem = self._problem
        largest = max(part.samples for part in problem.parts)
        fixed, each = needs.working
        coarse = any(p.dtype.itemsize < 4 for p in problem.params)  # too coarse to see that two losses are the same
        whole = problem.asked is not None or problem.batch_statistics or coarse or bool(random_modules(problem))
        if whole or problem.device.type != "cpu" or each <= 0:
            return largest
        # What a part takes whatever its size, such as vectors of all weights, must stay small beside its samples.
        return min(largest, max(1, int(max(QUICK, 4 * fixed) / each)))

    def in_pieces(self, evaluated: Callable[[Part], Evaluated]) -> tuple[Evaluated | None, bool]:
        """Cut the batches into quick pieces, where that leaves the loss what it is.

        Args:
            evaluated: gives the loss and the gradient of a part, if need be from the graphs that products use.

        Returns:
            The loss and the gradient of the first batch as a whole, None where they were not needed; and whether the
            batches are cut, which shows as well that the loss is the same every time.
        """
        problem = self._problem
        size = problem.smallest(self._pieces)
        if problem.smallest(int(max(part.samples for part in problem.parts) <= size)):
            return None, False
        batches, kept = problem.parts, self.keep
        whole = evaluated(batches[0])
        others = problem.losses(batches[1:]).tolist() if len(batches) > 1 else []
        problem.cut(size)
        self.keep = kept_parts(problem.parts, self._needs, self._budget)
        if problem.smallest(int(self._same(batches, whole, others, evaluated))):
            return whole, True
        problem.cut(None)
        self.keep = kept
        return whole, False

    def _same(
        self, batches: list[Part], whole: Evaluated, others: list[float], evaluated: Callable[[Part], Evaluated]
    ) -> bool:
        """Compare batches with their pieces: the loss and the gradient of the first, the losses of the others."""
        problem = self._problem
        limit = SAME * max(torch.finfo(p.dtype).eps for p in problem.params)
        pieces = iter(problem.parts)
        loss, gradient = 0.0, torch.zeros_like(whole[1])
        heights = lengths = 0.0
        for piece in _of(batches[0], pieces):
            share = piece.samples / batches[0].samples
            value, slope = evaluated(piece)
            loss += share * float(value)
            gradient.add_(slope, alpha=share)
            # Pieces may point against each other, near a minimum they do: so rounding is that of their lengths.
            heights += share * abs(float(value))
            lengths += share * float(slope.norm())
        good = abs(loss - float(whole[0])) <= limit * heights and float((gradient - whole[1]).norm()) <= limit * lengths
        for batch, other in zip(batches[1:], others, strict=True):
            mine = _of(batch, pieces)
            shares = torch.tensor([piece.samples / batch.samples for piece in mine], dtype=torch.float64)
            found = shares * problem.losses(mine)
            good = good and abs(float(found.sum()) - other) <= limit * float(found.abs().sum())
        return good


def _of(batch: Part, pieces: Iterator[Part]) -> list[Part]:
    """Take the pieces of a batch, which are the next ones."""
    mine: list[Part] = []
    while sum(piece.samples for piece in mine) < batch.samples:
        mine.append(next(pieces))
    return mine
