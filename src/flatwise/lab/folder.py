"""The run folder: where each file of a comparison is, and the lock that lets one process at a time write."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flatwise.files import make_folder
from flatwise.lab.lock import locked


@dataclass(frozen=True)
class RunFolder:
    """The layout of a run folder.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The settings, the methods with all their options, and the command."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Versions, threads and processor."""
        return self.path / "environment.json"

    @property
    def results(self) -> Path:
        """Every number of the table, and those behind it."""
        return self.path / "results.json"

    @property
    def curves(self) -> Path:
        """The figure."""
        return self.path / "curves.png"

    @property
    def timing(self) -> Path:
        """The interleaved timing."""
        return self.path / "timing.json"

    def epochs(self, name: str, seed: int) -> Path:
        """Name a run's record, which grows by one JSON line an epoch.

        Args:
            name: the method.
            seed: the run's seed.

        Returns:
            The file.
        """
        return self.path / "epochs" / f"{file_name(name)}-seed{seed}.jsonl"

    def job(self, name: str, seed: int) -> Path:
        """Name the file that a run leaves when it has finished.

        Args:
            name: the method.
            seed: the run's seed.

        Returns:
            The file.
        """
        return self.path / "jobs" / f"{file_name(name)}-seed{seed}.json"

    def checkpoint(self, name: str, seed: int) -> Path:
        """Name the file from which an unfinished run continues.

        Args:
            name: the method.
            seed: the run's seed.

        Returns:
            The file.
        """
        return self.path / "jobs" / f"{file_name(name)}-seed{seed}.checkpoint"

    def weights(self, name: str, seed: int) -> Path:
        """Name the file with the weights and buffers after a run's last step.

        Args:
            name: the method.
            seed: the run's seed.

        Returns:
            The file.
        """
        return self.path / "weights" / f"{file_name(name)}-seed{seed}.pt"

    @property
    def measures(self) -> Path:
        """How flat the trained weights are."""
        return self.path / "measures.json"

    @property
    def landscape(self) -> Path:
        """The loss around the trained weights."""
        return self.path / "landscape.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        """The folder with each figure of the page as a file."""
        return self.path / "figures"

    def worker_log(self, worker: int) -> Path:
        """Name the file that takes what a worker process prints.

        Args:
            worker: its number.

        Returns:
            The file.
        """
        return self.path / f"worker-{worker}.log"

    def _parts(self) -> tuple[Path, ...]:
        return tuple(self.path / part for part in ("epochs", "jobs", "weights"))

    def create(self) -> None:
        """Make the folder and its parts."""
        for folder in (self.path, *self._parts()):
            make_folder(folder)

    def clear(self) -> None:
        """Remove what a comparison wrote, and nothing else."""
        for folder in (*self._parts(), self.figures):
            shutil.rmtree(folder, ignore_errors=True)
        # What was measured, drawn and written about the old weights goes with them.
        made = (self.measures, self.landscape, self.landscape.with_suffix(".png"), self.report)
        for path in (self.config, self.environment, self.results, self.curves, self.timing, *made):
            path.unlink(missing_ok=True)
        for path in self.path.glob("worker-*.log"):
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of the folder while the block runs.

        Yields:
            Nothing.
        """
        self.create()
        with locked(self.path):
            yield


def file_name(method: str) -> str:
    """Turn a method's name into part of a file's name; different names stay different.

    Args:
        method: such as ``"sam:rho=0.5"``.

    Returns:
        Such as ``"sam_rho=0.5"``.
    """
    return re.sub(r"[^A-Za-z0-9=.+-]", lambda found: "_" if found[0] == ":" else f"%{ord(found[0]):x}", method)
