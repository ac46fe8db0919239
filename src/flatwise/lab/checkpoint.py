"""Where a run stands after an epoch, in a file that is whole or absent."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from flatwise.files import write_atomically


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next epoch depends on, and what was recorded so far.

    Attributes:
        identity: settings and versions that made it; another identity must not continue it.
        model: state of the model.
        optimizer: state of the optimizer.
        history: one record an epoch.
        samples_differentiated: gradient evaluations so far, counted in samples.
        seconds: training time so far.
    """

    identity: str
    model: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[str, Any]]
    samples_differentiated: int
    seconds: float


# By name, not with dataclasses.asdict, which would copy every tensor.
FIELDS = tuple(field.name for field in fields(Checkpoint))


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file, which is replaced.
        checkpoint: what it holds.
    """
    # Not durable on purpose: after a loss of power the last epochs are trained again, to the same numbers.
    content = {name: getattr(checkpoint, name) for name in FIELDS}
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path, identity: str) -> tuple[Checkpoint | None, str | None]:
    """Read a checkpoint, if there is one that can be continued.

    Args:
        path: the file.
        identity: what the checkpoint must have been made by.

    Returns:
        The checkpoint or None, and a notice where a file was there but is of no use.
    """
    if not path.exists():
        return None, None
    try:
        content = torch.load(path, weights_only=True)
        checkpoint = Checkpoint(**content)
    # What torch raises on a damaged file depends on where the damage is.
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ):
        return None, f"the checkpoint {path.name} is damaged; this run starts again from its beginning"
    if checkpoint.identity != identity:
        return (
            None,
            f"the checkpoint {path.name} is from other versions; this run starts again from its beginning",
        )
    return checkpoint, None
