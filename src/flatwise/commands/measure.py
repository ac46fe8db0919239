"""``flatwise measure``: how flat the trained weights are."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flatwise.commands.flags import POSITIONAL
from flatwise.errors import UserError

if TYPE_CHECKING:
    from flatwise.lab.measuring import Wanted

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

    def wanted(self) -> Wanted:
        """Check what is wanted of each network.

        Returns:
            It.

        Raises:
            UserError: a value that cannot be meant.
        """
        from flatwise.lab.measuring import Wanted

        words = self.m.split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise UserError(f"--m takes whole numbers separated by commas, such as 1,16,128, not {self.m!r}")
        if not 0 < self.rho < math.inf:
            raise UserError(f"--rho must be a number above 0, not {self.rho:g}")
        if self.probes < 0:
            raise UserError(f"--probes must be 0 or more, not {self.probes}")
        return Wanted(self.samples, self.rho, tuple(int(word) for word in words), self.probes)


def run(settings: Settings) -> int:
    """Measure, and print the table.

    Args:
        settings: what is measured.

    Returns:
        The exit code.
    """
    from flatwise.lab.measured import print_measures
    from flatwise.lab.measuring import compared, measure_all
    from flatwise.lab.subjects import find_subjects
    from flatwise.lab.table import console_for

    wanted = settings.wanted()
    subjects = find_subjects(settings)
    entries = measure_all(subjects, wanted, fresh=settings.fresh, progress=not settings.quiet)
    console = console_for(sys.stdout)
    print_measures(entries, compared(entries), console)
    console.print(subjects.where(subjects.folder.measures), markup=False)
    return 0
