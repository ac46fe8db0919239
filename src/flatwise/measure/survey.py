"""Visiting the points of a landscape: in which order, and writing down what was seen as it comes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatwise.batching import map_tensors
from flatwise.errors import UserError
from flatwise.measure.fingerprint import bits, everywhere
from flatwise.measure.landscape_result import EVALUATED, INTERPOLATED, Landscape, Mark, Track
from flatwise.measure.progress import Bar
from flatwise.measure.refine import Found, Index, Plan, refined
from flatwise.measure.result import Cost
from flatwise.measure.sheet import Sheet
from flatwise.measure.spans import Span, coordinates_of

WRITE_EVERY = 1.0
"""Seconds between two writings of the file."""


class Survey:
    """The points of a landscape that were visited so far, in memory and in the file.

    Args:
        start: the landscape with no point known.
        sheets: one for each model.
        span: of the first model, whose places and training run are looked at, too.
        path: the file; None: none.
    """

    def __init__(self, start: Landscape, sheets: Sequence[Sheet], span: Span, path: Path | None) -> None:
        self._sheets, self._span, self._path = list(sheets), span, path
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

    def everything(self, *, progress: bool) -> None:
        """Measure what is missing.

        Args:
            progress: whether a bar may be shown on a terminal.
        """
        if self.seen.complete:
            return
        seen = self.seen
        sizes = tuple(len(axis) for axis in seen.axes)
        plans = [
            _all(sizes) if seen.tolerance is None else refined(sizes, seen.tolerance, seen.seed) for _ in seen.names
        ]
        with self.sheets(), Bar("landscape", seen.values[0].numel(), shown=progress) as bar:
            results = self._follow(dict(enumerate(plans)), bar)
            self._look_beside()
        errors = []
        for number, result in sorted(results.items()):
            assert result is not None
            values, measured, error = result
            seen.values[number] = values
            seen.states[number] = torch.where(measured, EVALUATED, INTERPOLATED)
            errors.append(error)
        self.put(error_seen=tuple(errors), complete=True)
        self.write()

    def _look_beside(self) -> None:
        """Measure the loss at places with a name, and along a training run: with its weights, and as projected."""
        sheet, span = self._sheets[0], self._span
        here = sheet.origin
        marks = (
            [
                Mark(name, where, sheet.loss_with(weights)[0])
                for (name, weights), where in zip(
                    span.places, coordinates_of(here, span.vectors, [w for _, w in span.places]), strict=True
                )
            ]
            if span.places
            else []
        )
        self.put(marks=tuple(marks))
        if span.steps:
            rows = [weights for _, weights in span.steps]
            places = coordinates_of(here, span.vectors, rows)
            self.put(
                track=Track(
                    steps=tuple(step for step, _ in span.steps),
                    coordinates=tuple(places),
                    losses=tuple(sheet.loss_with(row)[0] for row in rows),
                    projected=tuple(sheet.loss_at(place)[0] for place in places),
                    distances=tuple(sheet.distance(row, place) for row, place in zip(rows, places, strict=True)),
                )
            )

    def _follow(self, plans: dict[int, Plan], bar: Bar) -> dict[int, Found | None]:
        """Do what the plans ask for, all of them at the same pace, so that a file cut short shows all models alike."""
        wishes = {number: next(plan) for number, plan in plans.items()}
        found: dict[int, Found | None] = {}
        done = 0
        while wishes:
            # A plane asks for a third of its points, about; what is known is what it asked for so far.
            usual = 1.0 if self.seen.tolerance is None else 0.33
            total = max(done + sum(map(len, wishes.values())), usual * self.seen.values.numel())
            for turn in range(max(map(len, wishes.values()))):
                for number, points in wishes.items():
                    if turn < len(points):
                        self._look(number, points[turn])
                        bar.advance(total=total)
                        done += 1
            for number, points in list(wishes.items()):
                answers = [float(self.seen.values[number][point]) for point in points]
                wishes[number], found[number] = _next(plans[number], answers)
                if not wishes[number]:
                    del wishes[number]
        return found

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
            total.update(bits(tensor))
    for part in sheets[0].problem.parts:

        def add(leaf: Tensor) -> Tensor:
            total.update(bits(leaf))
            return leaf

        map_tensors(part.batch, add)
    everyone = everywhere(total.hexdigest(), sheets[0].problem.group)
    return hashlib.sha256("/".join(everyone).encode()).hexdigest()


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


def _next(plan: Plan, answers: Sequence[float]) -> tuple[list[Index], Found | None]:
    """Ask a plan for the next points; where there are none, for what was found."""
    wish: list[Index] = []
    try:
        while not wish:  # a round in which everything was known already
            wish, answers = plan.send(answers), []
    except StopIteration as end:
        return [], end.value
    return wish, None


def _all(sizes: Index) -> Plan:
    """Ask for all points, row by row."""
    points = list(product(*map(range, sizes)))
    values = yield points
    return torch.tensor(values, dtype=torch.float64).view(sizes), torch.ones(sizes, dtype=torch.bool), None
