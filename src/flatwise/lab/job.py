"""One run: one method and one seed, from its first epoch, or the last one saved, to its test accuracy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from flatwise.errors import CannotWriteError
from flatwise.files import finite, read_json, write_atomically, write_json
from flatwise.lab.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.folder import RunFolder
from flatwise.lab.loop import Trainer, score
from flatwise.lab.methods import Method, trained_methods
from flatwise.lab.weights import save_weights


@dataclass(frozen=True)
class Job:
    """What one run trains.

    Attributes:
        method: the row of the comparison.
        seed: decides everything that is drawn.
    """

    method: Method
    seed: int


def all_jobs(config: CompareConfig) -> list[Job]:
    """List the runs of a comparison; the same settings give the same list in every process.

    Args:
        config: the settings.

    Returns:
        Every method with every seed.
    """
    return [Job(method, seed) for seed in range(config.seeds) for method in trained_methods(config)]


def identity(config: CompareConfig) -> str:
    """Say what a run's numbers depend on: the settings and the versions.

    Args:
        config: the settings.

    Returns:
        One word.
    """
    return f"{config.identity()}/torch-{torch.__version__}/flatwise-{version('flatwise')}"


def finished(config: CompareConfig, job: Job, folder: RunFolder) -> dict[str, Any] | None:
    """Read the result of a run that has finished.

    Args:
        config: the settings that it must have had.
        job: the run.
        folder: the run folder.

    Returns:
        The result, or None where the run is still to be done.
    """
    result = read_json(folder.job(job.method.name, job.seed))
    if not isinstance(result, dict) or result.get("identity") != identity(config):
        return None
    return result


def run_job(
    config: CompareConfig,
    job: Job,
    folder: RunFolder,
    on_epoch: Callable[[int], None] = lambda epoch: None,
    on_notice: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train one method from one seed and leave the result in the folder.

    Args:
        config: the settings.
        job: method and seed.
        folder: takes the epochs' lines, the checkpoint, the weights and the result.
        on_epoch: called with the number of finished epochs, at the start too.
        on_notice: called with a sentence that the user should see.

    Returns:
        The result, as it is in the folder.

    Raises:
        CannotWriteError: the disk is full, or the folder cannot be written.
    """
    done = finished(config, job, folder)
    if done is not None:
        return done
    name, seed = job.method.name, job.seed
    trainer = Trainer(config, job.method, seed, load_data(config.dataset, config.data_root))
    path = folder.checkpoint(name, seed)
    checkpoint, notice = load_checkpoint(path, identity(config))
    if notice is not None:
        on_notice(f"{name}, seed {seed}: {notice}")
    history: list[dict[str, Any]] = []
    seconds = 0.0
    if checkpoint is not None:
        trainer.model.load_state_dict(checkpoint.model)
        trainer.optimizer.load_state_dict(checkpoint.optimizer)
        trainer.samples_differentiated = checkpoint.samples_differentiated
        history, seconds = list(checkpoint.history), checkpoint.seconds
    lines = folder.epochs(name, seed)
    # The lines may be one epoch ahead of the checkpoint, or end in half a line: they follow the checkpoint.
    write_atomically(lines, lambda file: file.write("".join(map(_line, history)).encode()))
    on_epoch(len(history))
    for epoch in range(len(history), trainer.epochs):
        start = time.perf_counter()
        train_loss = trainer.train_epoch(epoch)
        seconds += time.perf_counter() - start
        validation = score(trainer.predict(trainer.split.validation_inputs), trainer.split.validation_labels)
        record = {
            "method": name,
            "seed": seed,
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "validation_loss": validation.loss,
            "validation_accuracy": validation.accuracy,
            "seconds": round(seconds, 4),
        }
        history.append(record)
        save_checkpoint(
            path,
            Checkpoint(
                identity=identity(config),
                model=trainer.model.state_dict(),
                optimizer=trainer.optimizer.state_dict(),
                history=history,
                samples_differentiated=trainer.samples_differentiated,
                seconds=seconds,
            ),
        )
        try:
            with lines.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            raise CannotWriteError(lines, error) from error
        on_epoch(epoch + 1)
    result = _result(config, job, trainer, history, seconds)
    save_weights(folder.weights(name, seed), trainer.model)
    # After the weights: this file says that the run is finished.
    write_json(folder.job(name, seed), result)
    path.unlink(missing_ok=True)
    return result


def _result(
    config: CompareConfig, job: Job, trainer: Trainer, history: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    split, data = trainer.split, trainer.data
    predictions = trainer.predict(split.inputs)
    wrong = split.wrong
    memorised = predictions.argmax(dim=1)[wrong] == split.labels[wrong]
    # The one place in the lab that looks at the test set: after the last epoch, once a run.
    test = score(trainer.predict(data.test_inputs), data.test_labels)
    return {
        "identity": identity(config),
        "method": job.method.name,
        "seed": job.seed,
        "epochs": trainer.epochs,
        "steps": trainer.total_steps,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "validation_accuracy": history[-1]["validation_accuracy"],
        "train_accuracy": score(predictions, split.labels).accuracy,
        "wrong_labels": int(wrong.sum()),
        "wrong_labels_fitted": float(memorised.float().mean()) if bool(wrong.any()) else None,
        "gradient_evaluations_per_step": trainer.samples_differentiated / (trainer.total_steps * trainer.batch_size),
        "seconds": round(seconds, 4),
        "history": history,
    }


def _line(record: dict[str, Any]) -> str:
    # A loss that is not a number must not break the reader of the lines.
    return json.dumps(finite(record)) + "\n"
