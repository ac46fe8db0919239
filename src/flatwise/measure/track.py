"""Sharpness over training: every N steps, on samples that do not change, without changing the training.

The probe is read once. A measurement leaves weights, gradients, buffers, modes and random state as they were, bit for
bit, so a run with a tracker is the run without it. Eigenvalues start from the eigenvectors of the measurement before.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch.nn import Module

from flatwise.errors import UnknownNameError, UserError
from flatwise.files import read_json, write_atomically, write_json
from flatwise.measure.curvature import WarmStart
from flatwise.measure.data import read_batches
from flatwise.measure.menu import chosen
from flatwise.measure.problem import LossFn
from flatwise.measure.result import digits, plain
from flatwise.measure.sharpness import sharpness

_GIVEN = ("model", "loss_fn", "data", "measures", "warm_start")

KIND = "flatwise sharpness over training"


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        step: when.
        values: by the name of the row.
        standard_errors: by the name of the row; None where there is none.
        cautions: sentences.
        gradient_evaluations: what it cost.
        seconds: what it took.
    """

    step: int
    values: dict[str, float]
    standard_errors: dict[str, float | None]
    cautions: tuple[str, ...]
    gradient_evaluations: float
    seconds: float

    def __str__(self) -> str:
        """Write one line."""
        numbers = [f"{name} {digits(value, self.standard_errors[name])}" for name, value in self.values.items()]
        return f"step {self.step}: {', '.join(numbers)}"


class Tracker:
    """Measures every N steps; made by :func:`track`.

    Args:
        model: that is trained.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        probe: one batch, or an iterable of batches, read once.
        every: how many steps lie between two measurements.
        measures: names as of :func:`flatwise.measure.sharpness`.
        options: of :func:`flatwise.measure.sharpness`.

    Attributes:
        records: what was measured so far.

    Raises:
        UnknownNameError: an option that :func:`flatwise.measure.sharpness` does not have.
        UserError: if ``every`` is no number of steps.
    """

    def __init__(
        self, model: Module, loss_fn: LossFn, probe: Any, every: int, measures: Sequence[str], options: dict[str, Any]
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UserError(f"every must be a whole number of steps >= 1, got {every!r}")
        known = [name for name in inspect.signature(sharpness).parameters if name not in _GIVEN]
        for name in options:
            if name not in known:
                raise UnknownNameError("option", name, known)
        self.records: list[Record] = []
        self._model, self._loss_fn, self._probe = model, loss_fn, read_batches(probe)
        self._every, self._measures, self._options = every, chosen(measures), options
        self._warm = WarmStart()

    def __call__(self, step: int) -> Record | None:
        """Measure, if it is time. Call it after each step, with the number of steps that were made.

        Args:
            step: how many steps were made.

        Returns:
            What was measured; None where it is not time.
        """
        if step % self._every:
            return None
        started = time.perf_counter()
        table = sharpness(
            self._model,
            self._loss_fn,
            iter(self._probe),
            measures=self._measures,
            warm_start=self._warm,
            **{"progress": False, **self._options},
        )
        record = Record(
            step=step,
            values={row.name: row.value for row in table.rows},
            standard_errors={row.name: row.standard_error for row in table.rows},
            cautions=table.cautions,
            gradient_evaluations=table.cost.gradient_evaluations,
            seconds=time.perf_counter() - started,
        )
        self.records.append(record)
        return record

    def _settings(self) -> dict[str, Any]:
        hidden = ("process_group", "progress")
        options = {name: value for name, value in self._options.items() if name not in hidden}
        plain_options = {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in options.items()}
        return {"every": self._every, "measures": list(self._measures), "options": plain_options}

    def save(self, path: str | Path) -> None:
        """Write the records as JSON, wholly or not at all.

        Args:
            path: the file; its folder exists.
        """
        write_json(Path(path), {"kind": KIND, **self._settings(), "records": plain(self.records)})

    def load(self, path: str | Path) -> None:
        """Read records that were saved, to go on with them.

        Args:
            path: the file.

        Raises:
            UserError: if it is no such file, or was written with other settings.
        """
        content = read_json(Path(path))
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise UserError(f"{path} holds no records of a tracker")
        for name, value in self._settings().items():
            if content.get(name) != value:
                raise UserError(f"{path} was written with {name}={content.get(name)!r}, this tracker has {value!r}")
        self.records = [_read(entry) for entry in content["records"]]

    def plot(self, path: str | Path, rows: Sequence[str] | None = None) -> None:
        """Draw measures over the steps, side by side, as a PNG.

        Args:
            path: the file; its folder exists.
            rows: names of rows, such as ``["one_step", "lambda_max"]``; None: all.

        Raises:
            UnknownNameError: if a row was not measured every time.
            UserError: if nothing was measured, or matplotlib is missing.
        """
        if not self.records:
            raise UserError("there is nothing to draw: no step was measured yet")
        try:
            from flatwise.report.bands import Band, Panel
            from flatwise.report.figures import draw_panels
        except ImportError as error:
            raise UserError("drawing needs matplotlib: pip install 'flatwise[measure]'") from error
        names = [name for name in self.records[-1].values if all(name in r.values for r in self.records)]
        for name in rows or ():
            if name not in names:
                raise UnknownNameError("row", name, names)
        steps = [record.step for record in self.records]
        panels = []
        for name in names if rows is None else rows:
            values = [record.values[name] for record in self.records]
            errors = [record.standard_errors[name] or 0.0 for record in self.records]
            panels.append(Panel(name.replace("_", " "), "", [Band(name, steps, values, errors)]))
        title, bands = "Sharpness over training", "bands: one standard error, where it is known"

        def draw(file: BinaryIO) -> None:
            draw_panels(panels, file, title=title, subtitle=bands, horizontal="step")

        write_atomically(Path(path), draw)


def _read(entry: dict[str, Any]) -> Record:
    values = {name: float("nan") if value is None else value for name, value in entry["values"].items()}
    return Record(**{**entry, "values": values, "cautions": tuple(entry["cautions"])})


def track(
    model: Module,
    loss_fn: LossFn,
    probe: Any,
    *,
    every: int = 100,
    measures: str | Sequence[str] = ("one_step", "lambda_max"),
    **options: Any,
) -> Tracker:
    """Make a callback that measures sharpness every N steps.

    Args:
        model: that is trained.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        probe: one batch, or an iterable of batches, read once; a few hundred samples do.
        every: how many steps lie between two measurements.
        measures: names as of :func:`sharpness`.
        **options: of :func:`sharpness`, such as ``rho`` or ``micro_batch_size``.

    Returns:
        The tracker: call it with the number of the step, after the step.
    """
    return Tracker(model, loss_fn, probe, every, (measures,) if isinstance(measures, str) else measures, options)
