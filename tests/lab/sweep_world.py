"""A sweep without training: an accuracy that is a formula of the settings, so that every number can be foreseen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flatwise.lab.sweep import SweepConfig
from flatwise.lab.train import TrainConfig

EPOCHS = 4
FIXED = {"dataset": "digits", "model": "mlp", "epochs": EPOCHS, "train_size": 200, "batch_size": 32}
PEAK = 0.2


def height(config: TrainConfig) -> float:
    """Accuracy after the last epoch: highest for sam at rho = 0.2 and a learning rate of 0.1."""
    radius = 1.5 if config.rho is None else abs(math.log10(config.rho / PEAK))
    return 0.95 - 0.2 * radius - 0.1 * abs(math.log10(config.lr / 0.1)) + 0.001 * (config.seed % 2)


class FakeTrain:
    """Stands where ``train`` is called; keeps what it was asked, and lets a test act at an epoch."""

    def __init__(self) -> None:
        self.calls: list[TrainConfig] = []
        self.stopped: list[TrainConfig] = []
        self.at_epoch: Callable[[TrainConfig, int], None] = lambda config, epoch: None

    def __call__(self, config: TrainConfig, on_epoch: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        self.calls.append(config)
        history = []
        for epoch in range(1, config.epochs + 1):
            self.at_epoch(config, epoch)
            record = {"epoch": epoch, "train_loss": 1.0, "validation_accuracy": height(config) * epoch / config.epochs}
            history.append(record)
            if on_epoch(record) is True:
                self.stopped.append(config)
                return {"stopped": True, "history": history, "test_accuracy": 1.0}
        return {"history": history, "test_accuracy": 1.0}


def config_in(folder: Path, **settings: Any) -> SweepConfig:
    given = {"methods": "sam", "trials": 6, "pruner": "none", "out": str(folder), "quiet": True, "fixed": FIXED}
    return SweepConfig(**{**given, **settings})


def states(folder: Path, name: str = "digits-mlp") -> list[str]:
    """How each trial stands, read from the journal by its own lines, without Optuna."""
    names = {0: "running", 1: "complete", 2: "pruned", 3: "fail", 4: "waiting"}
    trials: list[str] = []
    for line in (folder / name / "study.journal").read_text().splitlines():
        log = json.loads(line)
        if log["op_code"] == 4:  # a new trial, running unless it says otherwise
            trials.append(names[log["state"]] if "state" in log else "running")
        elif log["op_code"] == 6:
            trials[log["trial_id"]] = names[log["state"]]
    return trials
