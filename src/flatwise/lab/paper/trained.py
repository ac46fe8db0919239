"""A finished training, brought back: its network and the images that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatwise.lab.train.config import TrainConfig
from flatwise.lab.train.folder import TrainFolder
from flatwise.lab.train.network import trained_network
from flatwise.lab.train.samples import load_samples


@dataclass(frozen=True, eq=False)
class Trained:
    """What a measure looks at.

    Attributes:
        model: the network, in evaluation mode.
        inputs: training images as the network sees them without augmentation, the held-out ones left out.
        labels: the labels that it was trained with.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor

    def batches(self, size: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Cut the first training images into batches.

        Args:
            size: images in each.
            count: how many batches.

        Returns:
            Images and labels; fewer where there are not so many images.
        """
        rows = list(zip(torch.split(self.inputs, size), torch.split(self.labels, size), strict=True))[:count]
        return [row for row in rows if len(row[1]) == size]


def load_trained(config: TrainConfig, epoch: int | None = None) -> Trained:
    """Build the network as a training left it.

    Args:
        config: of the training, which has finished.
        epoch: after which the weights were kept; None: the last.

    Returns:
        Network and images.
    """
    samples = load_samples(config)
    folder = TrainFolder.of(config)
    weights = folder.weights if epoch is None else folder.kept_weights(epoch)
    model = trained_network(config, weights, samples)
    inputs = samples.plain("training", torch.arange(len(samples.labels)))
    return Trained(model.eval(), inputs, samples.labels)
