"""One kind of error for what a user of the lab and the measures can get wrong: one line, and the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """What keeps a comparison or a measurement from running; its text is one line, fit to be shown as it is.

    Attributes:
        exit_code: what the command returns; 2 where the user can mend the command, 1 where something failed.
        everywhere: whether all processes of a training raise it, so that the first one alone need say it; not so
            where one process finds a file missing or broken.
    """

    exit_code: int = 2
    everywhere: bool = True


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known name a mistyped one probably meant.

    Args:
        word: what was written.
        known: the right names.

    Returns:
        ``"; did you mean 'sam'?"``, or an empty string where nothing is close.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


class UnknownNameError(UserError):
    """A name that does not exist; the text has the nearest one and the list of all.

    Args:
        kind: what the name stands for, such as ``"method"``.
        word: what was written.
        known: the right names.
    """

    def __init__(self, kind: str, word: str, known: Iterable[str]) -> None:
        names = list(known)
        super().__init__(f"unknown {kind} {word!r}{nearest(word, names)} (known: {', '.join(names)})")


class TrainingError(UserError):
    """A run that failed, or a training process that ended on its own.

    Attributes:
        exit_code: 1.
    """

    exit_code: int = 1


class CannotWriteError(UserError):
    """A file or folder that cannot be written: the disk is full, or not ours.

    Args:
        path: what was to be written.
        error: what the system said.

    Attributes:
        exit_code: 1.
    """

    exit_code: int = 1

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"cannot write {path}: {error.strerror or error}")
