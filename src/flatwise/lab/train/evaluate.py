"""What a trained network predicts, and how often it is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flatwise.lab.train.loop import Trainer

EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Scores:
    """What an evaluation gives.

    Attributes:
        loss: mean cross-entropy, without smoothing and decay.
        accuracy: share that is right.
    """

    loss: float
    accuracy: float


@torch.no_grad()
def predict(trainer: Trainer, part: str) -> Tensor:
    """Compute logits as at test time.

    Args:
        trainer: has the network and the samples.
        part: "training" (not augmented), "validation" or "test".

    Returns:
        (images, classes), on the CPU.
    """
    trainer.module.eval()
    positions = torch.arange(len(trainer.samples.labels_of(part)))
    logits = []
    for chosen in torch.split(positions, EVALUATION_BATCH):
        images = trainer.samples.plain(part, chosen).to(trainer.world.device)
        if trainer.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits.append(trainer.module(images).float().cpu())
    return torch.cat(logits)


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Score predictions.

    Args:
        logits: (images, classes).
        labels: (images,).

    Returns:
        Mean loss and accuracy.
    """
    right = int((logits.argmax(dim=1) == labels).sum())
    return Scores(float(functional.cross_entropy(logits, labels)), right / len(labels))
