"""What a landscape is: the loss at the points of a line or plane, for one model or several, and all that explains it.

A file holds the same, as JSON. It is written while the points are measured, so that what is there can be drawn, and
whoever asks the same question of the same file gets the rest.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flatwise.errors import UserError
from flatwise.files import write_atomically
from flatwise.measure.result import Conditions, Cost, digits, plain

UNKNOWN, EVALUATED, INTERPOLATED = 0, 1, 2
"""The state of a point."""

Style = Literal["line", "contour", "surface"]

_VERSION = 1


@dataclass(frozen=True)
class Mark:
    """A place to be marked on the picture.

    Attributes:
        name: what is there, such as the name of a checkpoint.
        coordinates: where, on each axis.
        loss: measured there.
    """

    name: str
    coordinates: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Track:
    """A training run, seen on the line or plane.

    Attributes:
        steps: at which training steps the weights were recorded.
        coordinates: where each is projected to, on each axis.
        losses: with the recorded weights: the true ones.
        projected: with the weights of the projection: what the picture shows.
        distances: from the recorded weights to their projection.
    """

    steps: tuple[int, ...]
    coordinates: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    projected: tuple[float, ...]
    distances: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Landscape:
    """The loss on a line or plane through the weights.

    Attributes:
        names: of the models.
        axes: the coordinates of the points on each axis.
        labels: what each axis is, in words.
        values: the loss, shape (models, points) or (models, points, points), float64; the first axis comes first. NaN
            where it is not known yet, or is no number; infinities are kept.
        states: 0 not known yet, 1 evaluated, 2 interpolated; shape of ``values``.
        standard_errors: of evaluated points, from the spread between the parts of the data; NaN elsewhere, and where
            there is one part. Errors at different points are not independent: the samples are the same.
        directions: the kind of each direction.
        norms: for each model, the length of each direction.
        cosines: for each model, the cosine between the two directions of a plane.
        normalize: how random directions were scaled.
        biases: whether random directions move parameters of one dimension.
        orthogonalize: whether the second direction was made orthogonal to the first, after scaling.
        scale: ``"own"``: each model's weights scale the random directions. ``"shared"``: the first model's do.
        batch_norm: which statistics were used: ``"recompute"``, ``"frozen"``, ``"batch"``; ``"none"`` without such
            layers.
        seed: of random directions.
        tolerance: share of the range within which interpolated points were to be; None: all were evaluated.
        error_seen: for each model, the largest error of predictions in the last round of refinement, as a share of the
            range; None where nothing was predicted.
        explained: for each direction of ``"pca"``, the share of the variance of the recorded weights.
        marks: places with a name, such as checkpoints.
        track: a training run on the plane.
        annotate: numbers of the caller, for the figure.
        fingerprint: of weights, directions, data and settings; a file is only continued with the same.
        complete: whether every point is known.
        conditions: samples, mode and so on.
        cost: of everything, over all calls that wrote to the file.
    """

    names: tuple[str, ...]
    axes: tuple[tuple[float, ...], ...]
    labels: tuple[str, ...]
    values: Tensor
    states: Tensor
    standard_errors: Tensor
    directions: tuple[str, ...]
    norms: tuple[tuple[float, ...], ...]
    cosines: tuple[float, ...]
    normalize: str | None
    biases: bool
    orthogonalize: bool
    scale: str
    batch_norm: str
    seed: int
    tolerance: float | None
    error_seen: tuple[float | None, ...]
    explained: tuple[float, ...]
    marks: tuple[Mark, ...]
    track: Track | None
    annotate: Mapping[str, Any]
    fingerprint: str
    complete: bool
    conditions: Conditions
    cost: Cost

    @property
    def dimensions(self) -> int:
        """1 for a line, 2 for a plane."""
        return len(self.axes)

    @property
    def evaluations(self) -> int:
        """How many points were evaluated, over all models."""
        return int((self.states == EVALUATED).sum())

    def plot(
        self,
        path: str | Path | None = None,
        style: Style | None = None,
        *,
        log: bool | None = None,
        clip: float | None = None,
        title: str | None = None,
        dpi: int = 150,
    ) -> Any:
        """Draw the landscape; several models on one scale, and in 3-D with one camera.

        Args:
            path: where the figure is written, as its ending says: ``.png``, ``.svg``, ``.pdf``, or ``.html`` for
                surfaces that can be turned, in one file that needs no network. None: nowhere.
            style: ``"line"`` for a line; ``"surface"`` or ``"contour"`` for a plane; None: the first that fits.
            log: a logarithmic scale; None: where the values are positive and differ by more than a factor of 100.
            clip: the largest value that is drawn; what is above is cut, and the caption says so.
            title: above everything.
            dpi: pixels of an inch.

        Returns:
            The figure of matplotlib; None for ``.html``.

        Raises:
            UserError: if the style or the ending does not fit the landscape, or there is nothing to be drawn.
        """
        if path is not None and Path(path).suffix == ".html":
            if style not in (None, "surface"):
                raise UserError(f".html holds surfaces to be turned, not style={style!r}")
            return _report("turning").write(self, path, log=log, clip=clip, title=title)
        return _report("pictures").draw(self, path, style, log=log, clip=clip, title=title, dpi=dpi)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold, but for numbers that are not finite.

        Returns:
            Dicts, lists, strings, numbers, booleans and None.
        """
        result: dict[str, Any] = plain(self)
        return result

    def save(self, path: str | Path) -> None:
        """Write everything to a JSON file, in one go or not at all.

        Args:
            path: the file; its folder exists.
        """
        document = {"flatwise": "landscape", "version": _VERSION, **_spelt(self.as_dict())}
        text = json.dumps(document, ensure_ascii=False, allow_nan=False)
        # One field a line, so that two files can be compared.
        write_atomically(Path(path), lambda file: file.write((text.replace(', "', ',\n"') + "\n").encode()))

    @staticmethod
    def load(path: str | Path) -> Landscape:
        """Read a landscape from a file, be it complete or not.

        Args:
            path: a file that :meth:`save` or :func:`~flatwise.measure.landscape` wrote.

        Returns:
            The landscape.

        Raises:
            UserError: if there is no such file, or it is none of a landscape, or damaged.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"{path} is no landscape: it does not hold JSON") from error
        if not isinstance(document, dict) or document.get("flatwise") != "landscape":
            raise UserError(f"{path} is no landscape; one is written by flatwise.measure.landscape(..., path=...)")
        if document.get("version") != _VERSION:
            raise UserError(f"{path} has version {document.get('version')}, this release reads version {_VERSION}")
        try:
            return _built(document)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is a damaged landscape ({type(error).__name__}: {error})") from error

    def __str__(self) -> str:
        """Say what was measured, in a few lines."""
        size = " x ".join(str(len(axis)) for axis in self.axes)
        kind = "line" if self.dimensions == 1 else "plane"
        lines = [f"loss on a {kind} of {size} points, directions: {', '.join(dict.fromkeys(self.directions))}"]
        for number, name in enumerate(self.names):
            finite = self.values[number][torch.isfinite(self.values[number])]
            evaluated = int((self.states[number] == EVALUATED).sum())
            text = f"  {name}: "
            if finite.numel():
                text += f"{digits(float(finite.min()), None)} to {digits(float(finite.max()), None)}"
            text += f", {evaluated} of {self.values[number].numel()} points evaluated"
            error = self.error_seen[number]
            if error is not None:
                text += f", last predictions within {100 * error:.2g} % of the range"
            lines.append(text)
        if self.explained:
            lines.append("  variance explained: " + ", ".join(f"{100 * share:.1f} %" for share in self.explained))
        c = self.conditions
        lines.append(
            f"  {c.samples} samples, {c.weights} weights, mode {c.mode}, batch norm {self.batch_norm}, seed {self.seed}"
        )
        if not self.complete:
            lines.append("  not complete: ask again with the same path")
        lines += [f"  {note}" for note in c.notes]
        return "\n".join(lines)


def _report(module: str) -> Any:
    """Import what draws, which needs more than torch."""
    try:
        return importlib.import_module(f"flatwise.report.{module}")
    except ImportError as error:
        raise UserError(f"drawing needs {error.name}: pip install 'flatwise[measure]'") from error


def _spelt(value: Any) -> Any:
    """Write numbers that JSON does not know as words."""
    if isinstance(value, dict):
        return {key: _spelt(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_spelt(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _built(document: dict[str, Any]) -> Landscape:
    read = {entry.name: document[entry.name] for entry in fields(Landscape)}
    for name in ("values", "standard_errors"):
        read[name] = torch.tensor(_numbers(read[name]), dtype=torch.float64)
    read["states"] = torch.tensor(read["states"], dtype=torch.uint8)
    for name in ("names", "labels", "directions"):
        read[name] = tuple(read[name])
    for name in ("axes", "norms", "cosines", "explained", "error_seen"):
        read[name] = _tuples(_numbers(read[name]))
    read["marks"] = tuple(Mark(**_tuples(_numbers(mark, {"name"}))) for mark in read["marks"])
    read["track"] = None if read["track"] is None else Track(**_tuples(_numbers(read["track"])))
    read["conditions"] = Conditions(**_tuples(read["conditions"]))
    read["cost"] = Cost(**read["cost"])
    return Landscape(**read)


def _numbers(value: Any, words: frozenset[str] | set[str] = frozenset()) -> Any:
    if isinstance(value, dict):
        return {key: entry if key in words else _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
