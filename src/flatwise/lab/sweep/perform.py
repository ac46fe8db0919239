"""One trial: its trainings, one after the other; after each epoch the search says whether to go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flatwise.errors import TrainingError
from flatwise.lab.child import Event
from flatwise.lab.train import train
from flatwise.lab.train.config import train_config_from

Task = dict[str, Any]
"""``trial``, its number, and ``runs``, the fields of its trainings, all in one folder that is the trial's own."""


def perform(task: Task, tell: Callable[[Event], bool]) -> None:
    """Do the trainings of one trial.

    Args:
        task: what to train; where it is stopped, its folder is removed.
        tell: takes the events ``epoch``, ``run`` (a training has finished), and at the end ``done``, ``stopped`` or
            ``failed``; where it answers an ``epoch`` with True, the trial ends there.
    """
    trial = {"trial": task["trial"]}
    for values in task["runs"]:
        config = train_config_from(values)
        stopped = False

        def on_epoch(record: dict[str, Any]) -> bool:
            nonlocal stopped
            accuracy = record.get("validation_accuracy")
            stopped = tell({"event": "epoch", **trial, "epoch": record["epoch"], "accuracy": accuracy})
            return stopped

        try:
            result = train(config, on_epoch)
            if not stopped and _was_stopped(result):
                # What was stopped once is no result, whoever left it in the folder.
                result = train(replace(config, fresh=True), on_epoch)
        except TrainingError as error:
            # A loss that is no number, as a rule: the settings are bad, and the search is to learn it.
            tell({"event": "failed", **trial, "text": str(error)})
            return
        if stopped:
            # The study has its epochs; its checkpoints would only fill the disk, and could be taken for a result.
            shutil.rmtree(config.out, ignore_errors=True)
            tell({"event": "stopped", **trial})
            return
        last = result["history"][-1]
        tell({"event": "run", **trial, "accuracy": last["validation_accuracy"], "epochs": last["epoch"]})
    tell({"event": "done", **trial})


def _was_stopped(result: dict[str, Any]) -> bool:
    return bool(result.get("stopped")) or result.get("finished") is False
