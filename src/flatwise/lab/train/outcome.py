"""What a training is, and what it ended with: the content of ``config.json`` and ``result.json``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flatwise.lab.environment import describe
from flatwise.lab.train.evaluate import Predictions, predict
from flatwise.lab.train.loop import Trainer
from flatwise.measure.fingerprint import bits

if TYPE_CHECKING:
    from flatwise.lab.train.course import Course


def versions() -> str:
    """Say which versions make the numbers.

    Returns:
        Such as ``"torch 2.9.0, flatwise 0.1.0"``.
    """
    return f"torch {torch.__version__}, flatwise {version('flatwise')}"


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """Say what is trained, with everything that the settings left open.

    Args:
        trainer: as it was built.

    Returns:
        Settings, method with all its options, sizes, noise and environment.
    """
    # JSON knows no infinity, and p=inf is one.
    options = {name: value if value != math.inf else "inf" for name, value in trainer.method.options.items()}
    method, world, samples = trainer.method, trainer.world, trainer.samples
    return {
        "config": asdict(trainer.config),
        "method": {"name": method.name, "variant": method.variant, "options": options},
        "effective_m": trainer.effective_m,
        "processes": world.size,
        "batch_size": trainer.batch_size,
        "steps_per_epoch": trainer.steps_per_epoch,
        "total_steps": trainer.total_steps,
        "training_images": len(samples.training),
        "validation_images": len(samples.validation),
        "parameters": trainer.parameters,
        "noise": samples.noise,
        "environment": {
            **describe(1),
            "device": str(world.device),
            "processes": world.size,
            "threads_per_worker": torch.get_num_threads(),
        },
    }


def outcome(trainer: Trainer, course: Course, *, finished: bool) -> dict[str, Any]:
    """Evaluate the network after the last step; every process must call it.

    This is the only place that looks at the test set.

    Args:
        trainer: whose network is as it is to be evaluated.
        course: where the training stands.
        finished: whether all steps were made.

    Returns:
        The result.
    """
    samples = trainer.samples

    def of(part: str) -> Predictions:
        return predict(trainer.module, samples, part, trainer.world, channels_last=trainer.config.channels_last)

    training, tested = of("training"), of("test")
    test = tested.scores
    wrong = samples.wrong
    fitted = training.classes[wrong] == samples.labels[wrong]
    evaluations = trainer.loss.samples_differentiated * trainer.world.size
    last = course.history[-1] if course.history else {}
    return {
        "finished": finished,
        "epochs": len(course.history),
        "steps": course.steps,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "test_top5_accuracy": float(tested.in_five.double().mean()),
        "validation_loss": last.get("validation_loss"),
        "validation_accuracy": last.get("validation_accuracy"),
        "train_loss": training.scores.loss,
        "train_accuracy": training.scores.accuracy,
        "wrong_labels": int(wrong.sum()),
        "wrong_labels_fitted": float(fitted.float().mean()) if bool(wrong.any()) else None,
        "seconds": round(course.seconds, 4),
        "gradient_evaluations": evaluations,
        "gradient_evaluations_per_step": evaluations / (course.steps * trainer.batch_size),
        "weights_digest": weights_digest(trainer.whole_state()),
        "made_under": course.made_under,
        "history": course.history,
    }


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Compress weights and buffers into one word.

    Args:
        state: a model's state.

    Returns:
        The SHA-256 of names, kinds and bytes, in hexadecimal digits.
    """
    total = hashlib.sha256()
    for name, value in state.items():
        total.update(f"{name}/{value.dtype}/{tuple(value.shape)}/".encode())
        total.update(bits(value))
    return total.hexdigest()
