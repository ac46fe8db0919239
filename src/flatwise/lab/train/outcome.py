"""What a training ended with: the content of ``result.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from flatwise.lab.environment import describe
from flatwise.lab.train.evaluate import predict, score
from flatwise.lab.train.loop import Trainer


def outcome(trainer: Trainer, history: list[dict[str, Any]], seconds: float, *, finished: bool) -> dict[str, Any]:
    """Evaluate the network after the last step. This is the only place that looks at the test set.

    Args:
        trainer: whose network is as it is to be evaluated.
        history: one record an epoch.
        seconds: time of training alone.
        finished: whether all steps were made.

    Returns:
        The result.
    """
    samples = trainer.samples
    steps = min(len(history) * trainer.steps_per_epoch, trainer.total_steps)
    logits = predict(trainer, "training")
    wrong = samples.wrong
    memorised = logits.argmax(dim=1)[wrong] == samples.labels[wrong]
    test = score(predict(trainer, "test"), samples.labels_of("test"))
    return {
        "finished": finished,
        "config": asdict(trainer.config),
        "method": {
            "name": trainer.method.name,
            "variant": trainer.method.variant,
            "options": dict(trainer.method.options),
        },
        "effective_m": trainer.effective_m,
        "processes": trainer.world.size,
        "batch_size": trainer.batch_size,
        "epochs": len(history),
        "steps": steps,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "validation_loss": history[-1]["validation_loss"],
        "validation_accuracy": history[-1]["validation_accuracy"],
        "train_accuracy": score(logits, samples.labels).accuracy,
        "wrong_labels": int(wrong.sum()),
        "wrong_labels_fitted": float(memorised.float().mean()) if bool(wrong.any()) else None,
        "noise": samples.noise,
        "seconds": round(seconds, 4),
        "gradient_evaluations": trainer.loss.samples_differentiated,
        "gradient_evaluations_per_step": trainer.loss.samples_differentiated / (steps * trainer.share),
        "weights_digest": weights_digest(trainer.module.state_dict()),
        "environment": describe(1),
        "history": history,
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
        plain = value.detach().cpu().contiguous()
        total.update(f"{name}/{plain.dtype}/{tuple(plain.shape)}/".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
