"""One training from its first step, or the last one saved, to its result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from flatwise.files import finite, read_json, write_json
from flatwise.lab.lock import locked
from flatwise.lab.train.config import TrainConfig
from flatwise.lab.train.course import Course
from flatwise.lab.train.distributed import World
from flatwise.lab.train.folder import PROJECT, TrainFolder
from flatwise.lab.train.loop import Trainer
from flatwise.lab.train.optimizer import parse_train_method
from flatwise.lab.train.outcome import describe_run, outcome
from flatwise.lab.train.relabel import relabelled
from flatwise.lab.train.samples import load_samples
from flatwise.lab.train.trackers import usable_trackers
from flatwise.lab.weights import save_weights


def to_standard_error(text: str) -> None:
    """Print a notice.

    Args:
        text: one sentence.
    """
    print(f"flatwise: {text}", file=sys.stderr)


def train(
    config: TrainConfig,
    on_epoch: Callable[[dict[str, Any]], object] = lambda record: None,
    *,
    on_step: Callable[[int, int], object] = lambda done, total: None,
    on_notice: Callable[[str], object] = to_standard_error,
) -> dict[str, Any]:
    """Train, or read the result of the same training where it is finished.

    A training that was interrupted, however it was, goes on from its last checkpoint, to the same bits. Of several
    processes (``torchrun``, ``accelerate launch``) each must call this; the first one calls back and writes.

    Args:
        config: the settings.
        on_epoch: called after each epoch with its record; where it returns True, the training stops there, and the
            same call goes on.
        on_step: called with the number of steps made and of all steps, at the start too.
        on_notice: called with a sentence that the user should see.

    Returns:
        The result, as it is in ``result.json`` of the run's folder.
    """
    folder = TrainFolder.of(config)
    parse_train_method(config)  # a mistake is found before the folder is made
    notices: list[str] = []
    world = World(config, usable_trackers(config.tracker, notices.append), str(folder.path))

    def notice(text: str) -> None:
        if world.main:
            on_notice(text)

    with _alone(world, folder):
        found = world.first(lambda: _finished(config, folder))
        if found is not None:
            return found
        for text in notices:
            notice(text)
        with world.accelerator.local_main_process_first():  # what is downloaded, one process of a machine downloads
            samples = load_samples(config, world.device)
        trainer = Trainer(config, relabelled(config, samples, world), world)
        if world.main:
            return _train(trainer, folder, on_epoch, on_step, notice)
        return _train(trainer, folder, _ignored, _ignored, notice)


def _ignored(*_: object) -> None:
    """Take what the first process tells its caller, on the others."""


@contextmanager
def _alone(world: World, folder: TrainFolder) -> Iterator[None]:
    lock = locked(folder.path)

    def enter() -> None:
        folder.create()
        lock.__enter__()

    world.first(enter)
    try:
        yield
    finally:
        if world.main:
            lock.__exit__(None, None, None)


def _finished(config: TrainConfig, folder: TrainFolder) -> dict[str, Any] | None:
    if config.fresh:
        folder.clear()
    found = read_json(folder.result)
    return found if isinstance(found, dict) and found.get("finished") else None


def _train(
    trainer: Trainer,
    folder: TrainFolder,
    on_epoch: Callable[[dict[str, Any]], object],
    on_step: Callable[[int, int], object],
    notice: Callable[[str], object],
) -> dict[str, Any]:
    world, config = trainer.world, trainer.config
    course = Course(trainer, folder, on_step, notice)
    world.first(course.prepare)
    course.resume()
    described = describe_run(trainer)
    if world.size > 1:  # what nobody asked for, and what decides the result: said before the hours, not after them
        notice(
            f"{world.size} processes; {trainer.effective_m} of the {trainer.batch_size} images of a step share a "
            "perturbation"
        )

    def write_settings() -> None:
        write_json(folder.config, {"config": asdict(config), **described})
        write_json(folder.environment, described["environment"])

    world.first(write_settings)
    _start_trackers(trainer)
    if 0 in config.kept_epochs and course.steps == 0:
        course.keep_weights(0)
    stopped = False
    while course.steps < trainer.total_steps and not stopped:
        record = course.epoch()
        world.accelerator.log({k: v for k, v in record.items() if v is not None}, step=course.steps)
        stopped = world.first(lambda record=record: on_epoch(record) is True)  # type: ignore[misc]
    finished = course.steps == trainer.total_steps
    with trainer.evaluated():
        result = {**outcome(trainer, course, finished=finished), **described}
        state = trainer.whole_state()
    for tracker in world.accelerator.trackers:
        tracker.finish()

    def write_result() -> None:
        save_weights(folder.weights, state)
        write_json(folder.result, result)  # after the weights: this file says that the training is finished
        if finished:
            course.checkpoints.remove()

    world.first(write_result)
    plain: Any = finite(result)
    assert isinstance(plain, dict)
    return plain


def _start_trackers(trainer: Trainer) -> None:
    plain = {name: value if value is not None else "none" for name, value in asdict(trainer.config).items()}
    if trainer.world.accelerator.log_with:
        trainer.world.accelerator.init_trackers(PROJECT, config=plain)
