"""One task of a study, done with one thread: a training, or a measurement of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from flatwise.errors import TrainingError
from flatwise.files import read_json, write_json
from flatwise.lab.child import Event
from flatwise.lab.paper.measures import measure_trained
from flatwise.lab.pool import Task
from flatwise.lab.tasks import one_thread
from flatwise.lab.train import TrainConfig, train
from flatwise.lab.train.config import train_config_from
from flatwise.lab.train.folder import TrainFolder

BROKEN = "broken.json"
"""Left by a training whose loss did not stay finite: a result too, and the worst of all."""


def result_of(config: TrainConfig) -> dict[str, Any] | None:
    """Read the result of a training.

    Args:
        config: the training.

    Returns:
        The result, or None where it has not finished.
    """
    folder = TrainFolder.of(config)
    found = read_json(folder.result)
    if isinstance(found, dict) and found.get("finished"):
        return found
    broken = read_json(folder.path / BROKEN)
    return broken if isinstance(broken, dict) else None


def training(config: TrainConfig) -> Task:
    """Describe a training to a worker.

    Args:
        config: the training.

    Returns:
        The task.
    """
    return {"config": asdict(config)}


def measurement(name: str, config: TrainConfig) -> Task:
    """Describe a measurement to a worker.

    Args:
        name: of the measure.
        config: of the training that is measured.

    Returns:
        The task.
    """
    return {"config": asdict(config), "measure": name}


def perform(task: Task, send: Callable[[Event], None]) -> None:
    """Do one task with one thread, and leave the caller's threads and random state as they were.

    Args:
        task: a training or a measurement.
        send: takes the events ``epoch``.
    """
    assert isinstance(task, dict)
    config = train_config_from(task["config"])
    with one_thread():
        if "measure" in task:
            measure_trained(task["measure"], config)
        else:
            _train(config, send)


def _train(config: TrainConfig, send: Callable[[Event], None]) -> None:
    try:
        train(config, lambda record: send({"event": "epoch", "epoch": record["epoch"]}))
    except TrainingError as error:
        broke_down(config, error)


def broke_down(config: TrainConfig, error: TrainingError) -> None:
    """Leave the mark of a training whose loss did not stay finite.

    Args:
        config: of the training.
        error: what it ended with.
    """
    folder = TrainFolder.of(config)
    folder.create()
    write_json(folder.path / BROKEN, {"broken": str(error), "test_accuracy": None})
