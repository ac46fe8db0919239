"""Visiting the points of a landscape: in which order, and writing down what was seen as it comes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatwise.batching import map_tensors
from flatwise.errors import UserError
from flatwise.measure.landscape_result import EVALUATED, UNKNOWN, Landscape
from flatwise.measure.progress import Bar
from flatwise.measure.result import Cost
from flatwise.measure.sheet import Sheet

WRITE_EVERY = 1.0
"""Seconds between two writings of the file."""

Index = tuple[int, ...]


class Survey:
    """The points of a landscape that were visited so far, in memory and in the file.

    Args:
        start: the landscape with no point known.
        sheets: one for each model.
        path: the file; None: none.
    """

    def __init__(self, start: Landscape, sheets: Sequence[Sheet], path: Path | None) -> None:
        self._sheets, self._path = list(sheets), path
        self._group = sheets[0].problem.group
        self._writes = path is not None and (self._group is None or torch.distributed.get_rank(self._group) == 0)
        self.seen = self._continued(start)
        self._spent = self.seen.cost
        self._began = time.perf_counter()
        self._written = 0.0

    def _continued(self, start: Landscape) -> Landscape:
        """Take over what the file holds; the first process reads it for all."""
        if self._path is None:
            return start
        found: list[Landscape | UserError | None] = [None]
        if self._writes and self._path.exists():
            try:
                found = [Landscape.load(self._path)]
            except UserError as error:
                found = [error]
        if self._group is not None:
            first = torch.distributed.get_global_rank(self._group, 0)
            torch.distributed.broadcast_object_list(found, src=first, group=self._group)
        held = found[0]
        if isinstance(held, UserError):
            raise held
        if held is None:
            return start
        if held.fingerprint != start.fingerprint:
            raise UserError(f"{self._path} holds another landscape ({_difference(held, start)}): give another path")
        return replace(
            start,
            values=held.values,
            states=held.states,
            standard_errors=held.standard_errors,
            error_seen=held.error_seen,
            track=held.track,
            marks=held.marks,
            complete=held.complete,
            cost=held.cost,
        )

    def visit(self, points: Mapping[int, Sequence[Index]], bar: Bar) -> None:
        """Evaluate points that are not known yet.

        Args:
            points: for each model, by number, indices of points.
            bar: advanced at every point.
        """
        with self.sheets():
            # One model after the other at each place, so that a file cut short shows all of them alike.
            for turn in range(max((len(rows) for rows in points.values()), default=0)):
                for number, rows in points.items():
                    if turn < len(rows):
                        self._look(number, rows[turn])
                        bar.advance()

    def _look(self, number: int, index: Index) -> None:
        at = (number, *index)
        if int(self.seen.states[at]) == EVALUATED:
            return
        coordinates = [axis[i] for axis, i in zip(self.seen.axes, index, strict=True)]
        loss, error = self._sheets[number].loss_at(coordinates)
        self.seen.values[at], self.seen.standard_errors[at], self.seen.states[at] = loss, error, EVALUATED
        if time.perf_counter() - self._written > WRITE_EVERY:
            self.write()

    @contextmanager
    def sheets(self) -> Iterator[list[Sheet]]:
        """Open every sheet; also where it ends with an error, what was seen is in the file.

        Yields:
            The sheets.
        """
        try:
            with ExitStack() as stack:
                for sheet in self._sheets:
                    stack.enter_context(sheet)
                yield self._sheets
        finally:
            self.write()

    def put(self, **changes: Any) -> None:
        """Add to the landscape.

        Args:
            **changes: fields of the landscape.
        """
        self.seen = replace(self.seen, **changes)

    def write(self) -> None:
        """Write the file, and add up what was spent."""
        evaluations = sum(sheet.problem.gradient_evaluations for sheet in self._sheets)
        for sheet in self._sheets:
            sheet.problem.gradient_evaluations = 0.0
        now = time.perf_counter()
        old = self.seen.cost
        self.put(cost=Cost(old.gradient_evaluations + evaluations, old.seconds + now - self._began))
        self._began = now
        if self._writes and self._path is not None:
            self.seen.save(self._path)
        self._written = now


def fingerprint_of(sheets: Sequence[Sheet], settings: tuple[Any, ...]) -> str:
    """Tell one landscape from another by the bits of everything that it depends on, but the loss function.

    Args:
        sheets: one for each model.
        settings: what else matters.

    Returns:
        A hash, the same for all processes.
    """
    total = hashlib.sha256(repr(settings).encode())
    for sheet in sheets:
        for tensor in sheet.tensors():
            total.update(_bytes(tensor))
    for part in sheets[0].problem.parts:

        def add(leaf: Tensor) -> Tensor:
            total.update(_bytes(leaf))
            return leaf

        map_tensors(part.batch, add)
    mine = [total.hexdigest()]
    group = sheets[0].problem.group
    if group is not None:
        everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(everyone, mine[0], group=group)
        mine = everyone
    return hashlib.sha256("/".join(mine).encode()).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _difference(held: Landscape, asked: Landscape) -> str:
    named = (
        "names",
        "axes",
        "directions",
        "normalize",
        "biases",
        "orthogonalize",
        "scale",
        "batch_norm",
        "seed",
        "tolerance",
    )
    for name in named:
        if getattr(held, name) != getattr(asked, name):
            return f"{name} was {getattr(held, name)!r:.60}, is {getattr(asked, name)!r:.60}"
    if held.conditions != asked.conditions:
        return "with other conditions"
    return "with other weights, directions or data"


def everywhere(landscape: Landscape) -> list[Index]:
    """List all points, row by row.

    Args:
        landscape: whose points.

    Returns:
        The indices.
    """
    return list(product(*(range(len(axis)) for axis in landscape.axes)))


def is_known(landscape: Landscape) -> bool:
    """Say whether there is a value at every point.

    Args:
        landscape: any.

    Returns:
        Whether no state is unknown.
    """
    return bool((landscape.states != UNKNOWN).all())
