"""``flatwise measure``: how flat the trained weights are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from flatwise.commands.flags import POSITIONAL, parse_flags
from flatwise.errors import UserError

CONTINUES = True
DESCRIPTION = "Measure how flat trained weights are: sharpness, Hessian and spectrum, with standard errors."


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        run: a run folder, a file of weights in one (RUN/weights/sam-seed0.pt), or module:function, whose function
            returns (model, loss_fn, data).
        method: one method of the run; several are separated by commas (default: all).
        seed: which training of the run.
        samples: training samples to measure on, the same for every method.
        rho: radius of the ball in which the loss is made worst.
        m: sizes of micro-batches for m-sharpness, separated by commas.
        probes: random vectors for the Hessian's spectrum, the longest part; 0 leaves it out.
        out: folder for measures.json (default: the run folder; for module:function, the current folder).
        fresh: measure again what is there.
        quiet: no progress.
    """

    run: str = field(metadata={POSITIONAL: None})
    method: str | None = None
    seed: int = 0
    samples: int = 1024
    rho: float = 0.05
    m: str = "1,16,128"
    probes: int = 4
    out: str | None = None
    fresh: bool = False
    quiet: bool = False

    def sizes(self) -> tuple[int, ...]:
        """Read the sizes of micro-batches.

        Returns:
            The sizes.

        Raises:
            UserError: one is no whole number above 0.
        """
        words = self.m.split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise UserError(f"--m takes whole numbers separated by commas, such as 1,16,128, not {self.m!r}")
        return tuple(int(word) for word in words)


def parse(words: Sequence[str]) -> Settings | None:
    """Read the command line.

    Args:
        words: what follows ``measure``.

    Returns:
        The settings, or None where help was printed.
    """
    return parse_flags(Settings, words, "measure", DESCRIPTION)


def run(settings: Settings) -> int:
    """Measure, and print the table.

    Args:
        settings: what is measured.

    Returns:
        The exit code.
    """
    from flatwise.lab.measured import print_measures
    from flatwise.lab.measuring import Wanted, measure_all
    from flatwise.lab.subjects import find_subjects
    from flatwise.lab.table import console_for

    wanted = Wanted(settings.samples, settings.rho, settings.sizes(), settings.probes)
    subjects = find_subjects(
        settings.run, methods=split(settings.method), seed=settings.seed, samples=settings.samples, out=settings.out
    )
    entries = measure_all(subjects, wanted, fresh=settings.fresh, progress=not settings.quiet)
    console = console_for(sys.stdout)
    print_measures(entries, console)
    console.print(f"Every number: {subjects.folder.measures}", markup=False)
    if subjects.page:
        console.print(f"On the page: flatwise report {subjects.page}", markup=False)
    return 0


def split(methods: str | None) -> list[str]:
    """Read a list of methods.

    Args:
        methods: names separated by commas, or None.

    Returns:
        The names.
    """
    return [name.strip() for name in (methods or "").split(",") if name.strip()]
