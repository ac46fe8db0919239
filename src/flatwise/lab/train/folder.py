"""The folder of one training: where each of its files is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from flatwise.files import make_folder
from flatwise.lab.train.config import TrainConfig

PROJECT = "flatwise"
"""The name of the project for trackers."""


@dataclass(frozen=True)
class TrainFolder:
    """The layout of the folder.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @classmethod
    def of(cls, config: TrainConfig) -> TrainFolder:
        """Find the folder of a training, which may not be there yet.

        Args:
            config: the settings.

        Returns:
            The folder.
        """
        return cls(Path(config.out) / config.folder_name())

    @property
    def config(self) -> Path:
        """The settings, as they were given and as they were resolved."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Versions, devices and processes."""
        return self.path / "environment.json"

    @property
    def epochs(self) -> Path:
        """One line for each finished epoch."""
        return self.path / "epochs.jsonl"

    @property
    def result(self) -> Path:
        """Every number of the training, and that it is finished."""
        return self.path / "result.json"

    @property
    def weights(self) -> Path:
        """Weights and buffers as they are evaluated, after the last step."""
        return self.path / "weights.pt"

    @property
    def curves(self) -> Path:
        """TensorBoard's files, where Accelerate puts them."""
        return self.path / PROJECT

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The two files that take turns in holding where the training stands."""
        return self.path / "checkpoint-0", self.path / "checkpoint-1"

    def kept_weights(self, epoch: int) -> Path:
        """Name the file with the weights after an epoch.

        Args:
            epoch: how many epochs were finished; 0 is the start.

        Returns:
            The file.
        """
        return self.path / f"weights-epoch-{epoch}.pt"

    def create(self) -> None:
        """Make the folder."""
        make_folder(self.path)

    def clear(self) -> None:
        """Remove what a training wrote, and nothing else."""
        kept = (self.config, self.environment, self.epochs, self.result, self.weights, *self.checkpoints)
        for path in (*kept, *self.path.glob("weights-epoch-*.pt")):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.curves, ignore_errors=True)  # else the old curve and the new one would be drawn as one
