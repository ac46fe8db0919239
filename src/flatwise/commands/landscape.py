"""``flatwise landscape``: the loss around the trained weights of several methods, on one scale."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from flatwise.commands.flags import POSITIONAL

CONTINUES = True
DESCRIPTION = "Measure the loss around trained weights: the same samples, directions and scale for all methods."


@dataclass(frozen=True)
class Settings:
    """What is drawn.

    Attributes:
        run: a run folder, a file of weights in one (RUN/weights/sam-seed0.pt), or module:function, whose function
            returns (model, loss_fn, data).
        method: methods of the run, separated by commas (default: all).
        seed: which training of the run.
        samples: training samples to measure on, the same for every method.
        points: on each axis; an odd number has the trained weights among them.
        style: of the PNG; "line" also measures along one direction instead of two.
        directions: random ones (filter-normalised), that of SAM's perturbation, or the Hessian's eigenvectors.
        extent: how far from the weights (default: what the directions need).
        out: folder for landscape.json (default: the run folder; for module:function, the current folder).
        fresh: measure again what is there.
        quiet: no progress.
    """

    run: str = field(metadata={POSITIONAL: None})
    method: str | None = None
    seed: int = 0
    samples: int = 1024
    points: int = 25
    style: Literal["surface", "contour", "line"] = "surface"
    directions: Literal["random", "sam", "hessian"] = "random"
    extent: float | None = None
    out: str | None = None
    fresh: bool = False
    quiet: bool = False


def run(settings: Settings) -> int:
    """Measure, draw, and say where it is.

    Args:
        settings: what is drawn.

    Returns:
        The exit code.
    """
    from flatwise.lab.measuring import survey
    from flatwise.lab.subjects import find_subjects
    from flatwise.lab.table import console_for

    subjects = find_subjects(settings)
    seen = survey(subjects, settings, fresh=settings.fresh, progress=not settings.quiet)
    console = console_for(sys.stdout)
    console.print(str(seen), markup=False)
    picture = subjects.folder.landscape.with_suffix(".png")
    seen.plot(picture, settings.style)
    console.print(subjects.where(subjects.folder.landscape, picture), markup=False)
    return 0
