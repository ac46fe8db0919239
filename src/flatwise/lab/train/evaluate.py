"""What a trained network predicts, and how often it is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatwise.lab.loop import EVALUATION_BATCH, Scores
from flatwise.lab.train.distributed import World
from flatwise.lab.train.samples import Samples


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network says about the images of a part.

    Attributes:
        classes: the predicted class of each image.
        losses: the cross-entropy of each image with the label that it has.
        labels: these labels.
        in_five: whether the label is among the five likeliest classes.
    """

    classes: Tensor
    losses: Tensor
    labels: Tensor
    in_five: Tensor

    @property
    def scores(self) -> Scores:
        """Mean loss and accuracy."""
        right = int((self.classes == self.labels).sum())
        return Scores(float(self.losses.double().mean()), right / len(self.labels))


@torch.no_grad()
def predict(model: nn.Module, samples: Samples, part: str, world: World, *, channels_last: bool = False) -> Predictions:
    """Predict as at test time; every process must call it, and each predicts a share.

    Args:
        model: the network; it is left in the mode of evaluation.
        samples: has the images.
        part: "training" (not augmented), "validation" or "test".
        world: the processes.
        channels_last: the order of memory.

    Returns:
        The predictions, whole on every process and on the CPU.
    """
    model.eval()
    world.spread(list(model.buffers()))  # statistics of batch normalisation are a process's own
    labels = samples.labels_of(part)
    classes, losses, in_five = [], [], []
    batches = torch.split(torch.arange(len(labels)), EVALUATION_BATCH)
    # Filled up with what is thrown away below: every process must make as many passes of one size.
    shares = [world.share(functional.pad(batch, (0, -len(batch) % world.size))) for batch in batches]
    for batch, positions, images in zip(batches, shares, samples.plain_batches(part, shares), strict=True):
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with world.accelerator.autocast():
            logits = model(images)
        logits = logits.float()
        targets = labels[positions].to(world.device)
        classes.append(world.gather(logits.argmax(dim=1))[: len(batch)].cpu())
        five = logits.topk(min(5, logits.shape[1]), dim=1).indices
        in_five.append(world.gather((five == targets[:, None]).any(dim=1).to(torch.uint8))[: len(batch)].cpu().bool())
        losses.append(world.gather(functional.cross_entropy(logits, targets, reduction="none"))[: len(batch)].cpu())
    return Predictions(torch.cat(classes), torch.cat(losses), labels, torch.cat(in_five))
