"""Whether the disk will take what a training writes: asked before the first step, not after hours."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from flatwise.errors import TrainingError

SPARE = 1 << 20
"""Bytes of a checkpoint that are not weights: names, history, the file's own structure."""


def check_room(folder: Path, sizes: list[int]) -> None:
    """Write files of these sizes into a folder, all at once, and remove them.

    Args:
        folder: it exists.
        sizes: in bytes.

    Raises:
        TrainingError: the disk is full, or limited, or cannot be written.
    """
    parts = [folder / f".room-{number}.{os.getpid()}.part" for number in range(len(sizes))]
    try:
        for part, size in zip(parts, sizes, strict=True):
            _fill(part, size)
    except OSError as error:
        raise TrainingError(
            f"{folder} cannot take the {_megabytes(sum(sizes))} that this training writes there "
            f"({error.strerror or error}): make room, or choose another place with --out"
        ) from error
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _fill(path: Path, size: int) -> None:
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # takes the place without writing to it
            os.posix_fallocate(file.fileno(), 0, size)
            return
        block = bytes(1 << 20)
        for start in range(0, size, len(block)):
            file.write(block[: size - start])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"
