"""A finished training, evaluated again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flatwise.lab.loop import Scores
from flatwise.lab.train.distributed import World
from flatwise.lab.train.evaluate import predict
from flatwise.lab.train.network import read_training, trained_network
from flatwise.lab.train.samples import load_samples


@dataclass(frozen=True)
class Again:
    """What an evaluation from the weights gives.

    Attributes:
        scores: on the test set.
        recorded: the accuracy in the training's result.
        images: how many there are.
    """

    scores: Scores
    recorded: float
    images: int


def evaluate(path: str, data_root: str | None = None) -> Again:
    """Compute the test accuracy of a finished training from its weights.

    Args:
        path: the training's folder.
        data_root: folder in which to look for the data; None looks where the training did.

    Returns:
        The scores beside the recorded accuracy.
    """
    config, folder, result = read_training(path)
    if data_root is not None:
        config = replace(config, data_root=data_root)
    world = World(config)
    samples = load_samples(config, world.device)
    model = world.accelerator.prepare_model(
        trained_network(config, folder.weights, samples).to(world.device), evaluation_mode=True
    )
    predictions = predict(model, samples, "test", world, channels_last=config.channels_last)
    return Again(predictions.scores, result["test_accuracy"], len(predictions.labels))
