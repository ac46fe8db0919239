"""One process at a time in a folder.

The system holds the lock for the process and drops it when the process ends, however it ends; so the file that a
killed process leaves behind locks nobody out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flatwise.errors import CannotWriteError, UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

PATIENCE = 5.0
"""Seconds: a worker of a command that was killed just now takes a moment to notice that it is alone, and ends."""

_held: set[IO[str]] = set()


def _let_go() -> None:
    """Close what a forked process inherited: the lock is its parent's, and must not outlive that one."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a folder while the block runs.

    Args:
        folder: it exists.

    Yields:
        Nothing.

    Raises:
        CannotWriteError: the place cannot be written.
        UserError: another process is in the folder.
    """
    path = folder / ".lock"
    try:
        file = path.open("a+", encoding="ascii")
    except OSError as error:
        raise CannotWriteError(path, error) from error
    with file:
        until = time.monotonic() + PATIENCE
        while not (ours := _acquire(file)) and time.monotonic() < until:
            time.sleep(0.1)
        if not ours:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(f"another process (pid {owner}) is writing to {folder}; wait for it, or use another --out")
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        except OSError as error:
            raise CannotWriteError(path, error) from error
        # What a killed process had half written; with the lock held, nobody is writing it any more.
        for part in folder.rglob(".*.part"):
            part.unlink(missing_ok=True)
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def _acquire(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            # Far behind the process id, since Windows locks what it covers against reading too.
            file.seek(1024)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
