"""Writing that is either done or not done: a reader, or a run that was killed, never meets half a file."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from flatwise.errors import CannotWriteError


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where they are not there.

    Args:
        path: the folder.

    Raises:
        CannotWriteError: the place cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(path, error) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False) -> None:
    """Write a file under another name beside its place, then rename it.

    Args:
        path: where the file is to be; its folder exists.
        write: writes the content into the open binary file.
        durable: also wait until the disk has it, so that it survives a loss of power.

    Raises:
        CannotWriteError: the disk is full, or the folder cannot be written.
    """
    # The process id keeps apart two writers, of which one is being killed.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CannotWriteError(path, error) from error
    finally:
        # After the rename there is nothing left to remove; after a failure, what was half written goes.
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically and durably; numbers that JSON does not know become null.

    Args:
        path: where the file is to be.
        value: dicts, lists, strings, numbers, booleans and None.
    """
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), durable=True)


def read_json(path: Path) -> Any:
    """Read JSON that may be missing or damaged.

    Args:
        path: the file.

    Returns:
        Its content, or None where there is no whole JSON document.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def finite(value: object) -> object:
    """Replace every NaN and infinity in a nest of dicts and lists by None.

    Args:
        value: the nest.

    Returns:
        A copy that JSON can hold.
    """
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
