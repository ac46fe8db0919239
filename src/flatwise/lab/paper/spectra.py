"""The Hessian's spectrum (Figure 3, left): run by benchmarks/spectra.py of a checkout, judged here like the others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatwise.errors import TrainingError, UserError
from flatwise.lab.paper.findings import Findings, Judged
from flatwise.lab.paper.verdicts import judge_more, together
from flatwise.lab.statistics import Estimate, paired_difference

PROGRAM = Path("benchmarks") / "spectra.py"
RECORD = Path("docs") / "results" / "spectra.json"


def run_spectra(workers: int) -> Path:
    """Run the benchmark; what it has already is kept.

    Args:
        workers: trainings side by side.

    Returns:
        Its record.

    Raises:
        UserError: this is no checkout of flatwise.
        TrainingError: the benchmark failed.
    """
    if not PROGRAM.exists():
        raise UserError(f"the spectra are run by {PROGRAM} of a checkout of flatwise: go to its folder")
    ended = subprocess.run([sys.executable, str(PROGRAM), "--workers", str(workers)], check=False)
    if ended.returncode:
        raise TrainingError(f"{PROGRAM} ended with exit code {ended.returncode}")
    return RECORD


def spectra_findings(found: Mapping[str, Any]) -> Findings:
    """Judge the figure's claims from the benchmark's record.

    Args:
        found: its content.

    Returns:
        Findings without cells.
    """
    epochs = found["settings"]["epochs"]
    last = epochs[-1]
    largest = [(f"epoch {epoch}", _difference(found, epoch, lambda row: row[0])) for epoch in epochs]
    ratio = [(f"epoch {last}", _difference(found, last, lambda row: row[0] / row[4]))]
    claims = (
        _judged("with SAM the Hessian's largest eigenvalue is smaller, at each of three times", largest),
        _judged("with SAM its ratio to the fifth is smaller at the end", ratio),
    )
    return Findings("largest eigenvalue", tuple(f"epoch {epoch}" for epoch in epochs), (), claims, ())


def _difference(found: Mapping[str, Any], epoch: int, of: Any) -> Estimate:
    values: dict[str, list[float]] = {}
    for run in sorted(found["runs"], key=lambda run: run["seed"]):
        (look,) = (look for look in run["looks"] if look["epoch"] == epoch)
        values.setdefault("sgd" if run["method"] == "sgd" else "sam", []).append(of(look["eigenvalues"]))
    return paired_difference(values["sgd"], values["sam"])


def _judged(text: str, parts: Sequence[tuple[str, Estimate]]) -> Judged:
    judged = tuple((name, difference, judge_more(difference)) for name, difference in parts)
    return Judged(text, "Figure 3 left", together([part[2] for part in judged]), judged, "less with SAM")
