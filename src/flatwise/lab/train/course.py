"""A training in time: epoch after epoch, with records, checkpoints and a watch on the loss."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatwise.errors import CannotWriteError, TrainingError
from flatwise.files import finite, write_atomically
from flatwise.lab.train.checkpoint import Checkpoints
from flatwise.lab.train.evaluate import predict
from flatwise.lab.train.folder import TrainFolder
from flatwise.lab.train.loop import Trainer
from flatwise.lab.train.outcome import versions
from flatwise.lab.train.room import SPARE, check_room
from flatwise.lab.train.state import capture, restore, state_bytes
from flatwise.lab.train.watch import Watch
from flatwise.lab.weights import save_weights

LOOK_EVERY = 50
"""Steps between two looks at the loss, where a look waits for a device or for other processes."""


class Course:
    """Where a training stands.

    Attributes:
        steps: steps made.
        history: one record for each finished epoch.
        seconds: time of training alone: no evaluation, no writing.
        made_under: versions of torch and flatwise that had a part in it.

    Args:
        trainer: takes the steps.
        folder: takes records, checkpoints and weights.
        on_step: called with the number of steps made and of all steps.
        notice: called with a sentence that the user should see.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: TrainFolder,
        on_step: Callable[[int, int], object],
        notice: Callable[[str], object],
    ) -> None:
        self._trainer, self._folder, self._on_step, self._notice = trainer, folder, on_step, notice
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.made_under = [versions()]
        self.checkpoints = Checkpoints(folder.checkpoints, settings_word(trainer))
        alone = trainer.world.size == 1 and trainer.world.device.type == "cpu"
        self._look_every = 1 if alone else LOOK_EVERY
        self._watch = Watch(trainer.world.scaler is not None)
        self._losses: list[Tensor] = []  # of this epoch
        self._looked = 0  # how many of them were looked at
        self._saved_at = time.monotonic()
        self._failed = False

    def prepare(self) -> None:
        """Check that there is room for everything that will be written."""
        model, whole = state_bytes(self._trainer)
        there = sum(path.exists() for path in self._folder.checkpoints)
        epochs = self._trainer.config.kept_epochs
        kept = [model + SPARE for epoch in epochs if not self._folder.kept_weights(epoch).exists()]
        check_room(self._folder.path, [*[whole + SPARE] * (3 - there), model + SPARE, *kept])

    def resume(self) -> None:
        """Continue from the newest checkpoint that is whole; every process must call it.

        Raises:
            TrainingError: the processes do not see the same files.
        """
        world = self._trainer.world
        content, notices = self.checkpoints.load()
        for text in notices:
            self._notice(text)
        step = 0 if content is None else content["step"]
        if world.first(lambda: step) != step:
            raise TrainingError(f"{self._folder.path} is another folder for some processes: --out must be one for all")
        if content is not None:
            restore(self._trainer, content["state"])
            self.steps, self.seconds = content["step"], content["seconds"]
            self.history = json.loads(content["history"])
            self._losses = list(content["losses"].to(world.device))
            self._looked = len(self._losses)
            self.made_under = [*content["made_under"]]
            if versions() not in self.made_under:
                self._notice(
                    f"step {self.steps} was made under {self.made_under[-1]}; it goes on under {versions()}, whose "
                    "numbers may differ in the last digits"
                )
                self.made_under.append(versions())
        # The lines may be ahead of the checkpoint, or end in half a line: they follow the checkpoint.
        world.first(self._write_history)
        self._on_step(self.steps, self._trainer.total_steps)

    def epoch(self) -> dict[str, Any]:
        """Train to the end of the present epoch, evaluate, and save.

        Returns:
            The epoch's record.
        """
        trainer = self._trainer
        number = self.steps // trainer.steps_per_epoch
        end = min((number + 1) * trainer.steps_per_epoch, trainer.total_steps)
        trainer.begin_epoch(self.steps)
        start = time.perf_counter()
        while self.steps < end:
            self._losses.append(trainer.step(self.steps))
            self.steps += 1
            if self.steps == end or self.steps % self._look_every == 0:
                self._look()
                if self.steps < end and self._is_due():
                    self.seconds += time.perf_counter() - start
                    self._save()
                    start = time.perf_counter()
            self._on_step(self.steps, trainer.total_steps)
        train_loss = float(torch.stack(self._losses).mean())
        self.seconds += time.perf_counter() - start
        self._losses, self._looked = [], 0
        record = {
            "epoch": number + 1,
            "steps": self.steps,
            "train_loss": train_loss,
            "lr": trainer.rate(self.steps - 1),
            **self._validate(number + 1),
            "seconds": round(self.seconds, 4),
        }
        self.history.append(record)
        if number + 1 in trainer.config.kept_epochs:
            self.keep_weights(number + 1)
        self._save()
        trainer.world.first(lambda: self._append(record))
        return record

    def keep_weights(self, epoch: int) -> None:
        """Write the weights as they are evaluated; every process must call it.

        Args:
            epoch: how many epochs are finished.
        """
        with self._trainer.evaluated():
            state = self._trainer.whole_state()
        self._trainer.world.first(lambda: save_weights(self._folder.kept_weights(epoch), state))

    def _validate(self, epoch: int) -> dict[str, float | None]:
        trainer, config = self._trainer, self._trainer.config
        due = epoch % config.evaluate_every == 0 or self.steps == trainer.total_steps
        if not (due and len(trainer.samples.validation)):
            return {"validation_loss": None, "validation_accuracy": None}
        with trainer.evaluated():
            held = predict(
                trainer.module, trainer.samples, "validation", trainer.world, channels_last=config.channels_last
            ).scores
        return {"validation_loss": held.loss, "validation_accuracy": held.accuracy}

    def _look(self) -> None:
        """Look at the losses since the last look; all processes see the same ones, so that all stop or none."""
        trainer, first = self._trainer, self.steps - len(self._losses) + self._looked
        means = trainer.world.mean(torch.stack(self._losses[self._looked :]))
        self._losses[self._looked :] = means.unbind()  # of all processes: a checkpoint holds them for each
        self._looked = len(self._losses)
        last = trainer.optimizer.last
        rates = [trainer.rate(step) for step in range(first, self.steps)]
        self._watch.look(means.cpu(), rates, first, last.rho, updated=last.updated)

    def _is_due(self) -> bool:
        waited = time.monotonic() - self._saved_at > 60 * self._trainer.config.checkpoint_minutes
        return self._trainer.world.first(lambda: waited)

    def _save(self) -> None:
        """Write a checkpoint; every process must call it. One that fails leaves the one before it."""
        trainer = self._trainer
        content = {
            "step": self.steps,
            "seconds": self.seconds,
            "history": json.dumps(self.history),
            "losses": torch.stack(self._losses).cpu() if self._losses else torch.zeros(0),
            "made_under": self.made_under,
            "state": capture(trainer),
        }
        self._saved_at = time.monotonic()
        if not trainer.world.main:
            return
        try:
            self.checkpoints.save(content)
            self._failed = False
        except CannotWriteError as error:
            if not self._failed:
                self._notice(f"{error}; the training goes on, and the checkpoint before this one stays")
            self._failed = True

    def _write_history(self) -> None:
        lines = "".join(map(_line, self.history))
        write_atomically(self._folder.epochs, lambda file: file.write(lines.encode()))

    def _append(self, record: dict[str, Any]) -> None:
        try:
            with self._folder.epochs.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            self._notice(f"{CannotWriteError(self._folder.epochs, error)}; the result will have the record")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record)) + "\n"


def settings_word(trainer: Trainer) -> str:
    """Say in one word what a training's numbers depend on.

    Args:
        trainer: as it was built.

    Returns:
        The settings' identity, the digest of the labels and the number of processes.
    """
    labels = trainer.samples.noise["digest"]
    return f"{trainer.config.identity()}/labels-{labels}/processes-{trainer.world.size}"
