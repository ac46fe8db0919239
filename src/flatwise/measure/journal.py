"""The file of a run that can be resumed: what is done, and what it belongs to.

A measure puts down what it has whenever that is whole: a basis after a product, a probe, a row of a table. A later call
takes it up from there, and comes to the same bits, for all that is drawn depends on the seed and a name alone. The file
is written beside its place and renamed, so that it is never half there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flatwise.errors import UserError
from flatwise.files import write_atomically
from flatwise.measure.fingerprint import everywhere, fingerprint, fingerprint_of_batches
from flatwise.measure.problem import Problem

SECONDS_BETWEEN_WRITES = 10.0
"""How often what is in work is written; what is finished is written at once."""

SHARE_OF_WRITING = 0.05
"""Of the time, at most; a slow disk makes writing rarer."""


class Journal:
    """What is done of a run, by name.

    Args:
        path: where the file is; its folder exists. Processes that share the work need to see the same file. None: no
            file; then nothing is found, and nothing is written.
        what: is measured, such as ``"trace"``.
        problem: what it is about; what was noted in the file is noted in it.
        settings: what the bits depend on besides the problem.

    Raises:
        UserError: if the file is of another run, or none.
    """

    def __init__(self, path: str | Path | None, what: str, problem: Problem, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._what, self._problem = what, problem
        self._done: dict[str, Any] = {}
        self._last, self._took = time.monotonic(), 0.0
        if self.path is None:
            return
        model = problem.model
        mine = fingerprint_of_batches(problem.batches)
        self._settings = {
            **settings,
            "samples": problem.samples,
            "mode": problem.mode,
            "seed": problem.seed,
            "names": list(problem.names),
            "weights": problem.weights,
            "dtype": str(problem.dtype),
            "weights at": fingerprint([*model.parameters(), *model.buffers()]),
            "data": everywhere(mine, problem.group),
        }
        if len(set(everywhere(self._seen(self.path), problem.group))) > 1:
            raise UserError(f"{self.path} is not the same file on every process")
        if self.path.exists():
            self._read(self.path)

    def _seen(self, path: Path) -> str:
        """Tell one file from another; alone there is nothing to tell apart."""
        if self._problem.group is None or not path.exists():
            return str(path.exists())
        together = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                together.update(block)
        return together.hexdigest()

    def _read(self, path: Path) -> None:
        try:
            held = torch.load(path, weights_only=True, map_location="cpu")
            what, settings, done = held["what"], held["settings"], held["done"]
            notes, unused = held["notes"], held["unused"]
        except Exception as error:  # whatever a file that is cut off or foreign makes of the reader
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{path} is no file of a run that can be resumed ({reason:.120}): name another file, or remove it"
            ) from error
        if what != self._what:
            raise UserError(f"{path} is the file of another measure, {what}, not of {self._what}: name another file")
        different = [name for name, value in self._settings.items() if settings.get(name) != value]
        if different:
            hint = " (a loader that shuffles gives others each time)" if "data" in different else ""
            raise UserError(
                f"{path} is from a run with other {', '.join(different)}{hint}: name another file, or remove it"
            )
        self._done = done
        self._problem.unused = unused
        for note in notes:
            self._problem.note(note)

    def beside(self, name: str) -> Path | None:
        """Name the file of a measure that is a part of this one.

        Args:
            name: of the part.

        Returns:
            A path in the same folder; None without a file.
        """
        return self.path and self.path.with_name(f"{self.path.name}.{name}")

    def clear(self, name: str) -> None:
        """Remove the file of a part that is done.

        Args:
            name: of the part.
        """
        path = self.beside(name)
        if path is not None and self._problem.leads:
            path.unlink(missing_ok=True)

    def get(self, name: str) -> Any:
        """Take up what was put down.

        Args:
            name: of a piece.

        Returns:
            The piece, None where there is none.
        """
        return self._done.get(name)

    def put(self, name: str, piece: Any, *, now: bool = False) -> None:
        """Put down a piece, and write the file unless that was just done.

        Args:
            name: of the piece.
            piece: what :func:`torch.save` can write; or what gives it, asked each time the file is written.
            now: write in any case.
        """
        if self.path is None:
            return
        self._done[name] = piece
        # A whole basis may be written: where that takes long, it is written rarely.
        if not now and time.monotonic() - self._last < max(SECONDS_BETWEEN_WRITES, self._took / SHARE_OF_WRITING):
            return
        if self._problem.leads:
            begin = time.monotonic()
            held = {
                "what": self._what,
                "settings": self._settings,
                "done": {key: value() if callable(value) else value for key, value in self._done.items()},
                "notes": list(self._problem.notes),
                "unused": self._problem.unused,
            }
            write_atomically(self.path, lambda file: torch.save(held, file))
            self._took = time.monotonic() - begin
        self._last = time.monotonic()
