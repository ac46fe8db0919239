"""Made-up studies and trainings, whose right answers are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatwise.lab.paper.protocol import Run, plan
from flatwise.lab.paper.record import Record, line_of
from flatwise.lab.paper.study import Arm, Claim, Setting, Study
from flatwise.lab.train.config import TrainConfig

RATES = ({"lr": 0.1}, {"lr": 0.2})
RADII = ({"rho": 0.1}, {"rho": 0.2}, {"rho": 0.4})
BASE = Arm("SGD", {"method": "base"}, RATES, twice=True, printed="sgd")
SAM = Arm("SAM", {"method": "sam"}, RADII, printed="sam")
AGAIN = Arm("Bootstrap + SAM", {"method": "sam"}, like="SAM", labels_from="SAM", printed="bootstrap-sam")
TINY = {"dataset": "digits", "model": "mlp", "train_size": 200, "batch_size": 32, "epochs": 2, "augment": "none"}


def study(**changes: Any) -> Study:
    fields: dict[str, Any] = {
        "name": "made-up",
        "title": "Made up",
        "paper": "Table 4",
        "table": "4",
        "settings": (Setting("40 %", TINY, (BASE, SAM, AGAIN), printed="40"),),
        "claims": (Claim("SAM is better", "Table 4", "SAM", "SGD"),),
        "seeds": (0, 1, 2),
    }
    return Study(**{**fields, **changes})


def result(held: float, test: float = 0.5) -> dict[str, Any]:
    return {"validation_accuracy": held, "test_accuracy": test, "seconds": 1.0, "gradient_evaluations_per_step": 2.0}


def whole_plan(of: Study, finished: Any) -> list[Run]:
    return plan(of, finished, Path("out"))


def record(of: Study, accuracies: Mapping[str, Sequence[float]], held: Mapping[str, float] | None = None) -> Record:
    """Make the record in which each arm reached these test accuracies ("SGD twice": for twice the epochs)."""
    lines = []
    for run in whole_plan(of, lambda config: result(0.5)):
        name = f"{run.arm} twice" if run.stage == "twice" else run.arm
        test = accuracies.get(name, accuracies[run.arm])
        value = test[run.config.seed % len(test)]
        lines.append(line_of(run, result((held or {}).get(name, 0.5), value), None))
    return Record(of, lines, of.seeds)


def fake(scores: Mapping[float, float], tests: Mapping[float, float] | None = None) -> Any:
    """Finish every training, with a held-out accuracy by its rho and a test accuracy by its rho."""

    def finished(config: TrainConfig) -> dict[str, Any]:
        rho = config.rho or 0.0
        return result(scores.get(rho, 0.5), (tests or {}).get(rho, 0.5))

    return finished
