"""``flatwise report``: one page from one or several comparisons."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from flatwise.commands.flags import POSITIONAL

CONTINUES = True
DESCRIPTION = "Make one page, to read and to send, from what is in one or several run folders."


@dataclass(frozen=True)
class Settings:
    """What the page shows.

    Attributes:
        runs: run folders, as flatwise compare prints them.
        out: the page (default: report.html in the first run folder).
        full: first measure what the page could show and does not (flatwise measure, flatwise landscape).
        quiet: no progress.
    """

    runs: list[str] = field(metadata={POSITIONAL: "+"})
    out: str | None = None
    full: bool = False
    quiet: bool = False


def run(settings: Settings) -> int:
    """Write the page, and say where it is.

    Args:
        settings: what it shows.

    Returns:
        The exit code.
    """
    from flatwise.lab.reporting import write_report
    from flatwise.lab.table import console_for

    if settings.full:
        for path in settings.runs:
            _complete(path, quiet=settings.quiet)
    page = write_report([Path(path) for path in settings.runs], None if settings.out is None else Path(settings.out))
    console_for(sys.stdout).print(f"Report: {page}", markup=False)
    return 0


def _complete(path: str, *, quiet: bool) -> None:
    """Measure what is missing, as the commands do by default."""
    from flatwise.commands import landscape, measure
    from flatwise.lab.folder import RunFolder
    from flatwise.lab.measuring import measure_all, survey
    from flatwise.lab.subjects import find_subjects

    asked = measure.Settings(path)
    subjects = find_subjects(asked)
    # What is there already is kept, method by method.
    measure_all(subjects, asked.wanted(), progress=not quiet)
    if not RunFolder(Path(path)).landscape.exists():
        survey(subjects, landscape.Settings(path), progress=not quiet)
