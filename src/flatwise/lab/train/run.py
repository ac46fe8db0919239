"""One training from its first step to its result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flatwise.errors import CannotWriteError, TrainingError
from flatwise.files import finite, read_json, write_json
from flatwise.lab.environment import describe
from flatwise.lab.lock import locked
from flatwise.lab.train.config import TrainConfig
from flatwise.lab.train.distributed import World
from flatwise.lab.train.evaluate import predict, score
from flatwise.lab.train.folder import TrainFolder
from flatwise.lab.train.loop import Trainer
from flatwise.lab.train.outcome import outcome
from flatwise.lab.train.samples import load_samples
from flatwise.lab.weights import save_weights


def train(config: TrainConfig, on_epoch: Callable[[dict[str, Any]], object] = lambda record: None) -> dict[str, Any]:
    """Train, or read the result of the same training where it is finished.

    Args:
        config: the settings.
        on_epoch: called after each epoch with its record; where it returns True, the training stops there.

    Returns:
        The result, as it is in ``result.json`` of the run's folder.
    """
    folder = TrainFolder(Path(config.out) / config.folder_name())
    folder.create()
    with locked(folder.path):
        found = read_json(folder.result)
        if isinstance(found, dict) and found.get("finished") and not config.fresh:
            return found
        return _train(config, folder, on_epoch)


def _train(config: TrainConfig, folder: TrainFolder, on_epoch: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    folder.clear()
    world = World(config)
    trainer = Trainer(config, load_samples(config), world)
    write_json(folder.config, asdict(config))
    write_json(folder.environment, describe(1))
    history: list[dict[str, Any]] = []
    seconds = 0.0
    stopped = False
    if 0 in config.kept_epochs:
        save_weights(folder.kept_weights(0), trainer.module)
    for epoch in range(trainer.epochs):
        start = time.perf_counter()
        trainer.begin_epoch()
        losses = []
        first = epoch * trainer.steps_per_epoch
        for step in range(first, min(first + trainer.steps_per_epoch, trainer.total_steps)):
            losses.append(trainer.step(step))
            if not bool(torch.isfinite(losses[-1])) or not trainer.optimizer.last.updated:
                raise TrainingError(
                    f"the loss is {float(losses[-1])} in step {step + 1} of {trainer.total_steps} (learning rate "
                    f"{trainer.rate(step):g}, rho {trainer.optimizer.last.rho:g}): a smaller --lr, a longer --warmup, "
                    "--clip 1 or a smaller --rho may keep it finite"
                )
        train_loss = float(torch.stack(losses).mean())
        seconds += time.perf_counter() - start
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "lr": trainer.rate(step),
            "validation_loss": None,
            "validation_accuracy": None,
            "seconds": round(seconds, 4),
        }
        last = epoch + 1 == trainer.epochs
        with nullcontext() if trainer.average is None else trainer.average.in_place():
            if len(trainer.samples.validation) and (last or (epoch + 1) % config.evaluate_every == 0):
                held = score(predict(trainer, "validation"), trainer.samples.labels_of("validation"))
                record |= {"validation_loss": held.loss, "validation_accuracy": held.accuracy}
            if epoch + 1 in config.kept_epochs:
                save_weights(folder.kept_weights(epoch + 1), trainer.module)
        history.append(record)
        try:
            with folder.epochs.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(record)) + "\n")
        except OSError as error:
            raise CannotWriteError(folder.epochs, error) from error
        if on_epoch(record) is True and not last:
            stopped = True
            break
    with nullcontext() if trainer.average is None else trainer.average.in_place():
        result = outcome(trainer, history, seconds, finished=not stopped)
        save_weights(folder.weights, trainer.module)
    write_json(folder.result, result)
    return result
