"""Labels from a finished training: what its network predicts replaces the labels (bootstrapping, Table 4)."""

from __future__ import annotations

from flatwise.errors import UserError
from flatwise.lab.train.config import TrainConfig
from flatwise.lab.train.distributed import World
from flatwise.lab.train.evaluate import predict
from flatwise.lab.train.network import read_training, trained_network
from flatwise.lab.train.samples import Samples


def relabelled(config: TrainConfig, samples: Samples, world: World) -> Samples:
    """Let a finished training label the training images.

    Args:
        config: its ``labels_from`` is the folder.
        samples: with the labels as they are given.
        world: the processes.

    Returns:
        The samples with the predicted labels; their record has the share that differs from the given ones.

    Raises:
        UserError: the training was on other images or classes.
    """
    if config.labels_from is None:
        return samples
    teacher, folder, result = read_training(config.labels_from)
    if teacher.dataset != config.dataset:
        raise UserError(f"{config.labels_from} was trained on {teacher.dataset}, not on {config.dataset}")
    model = world.accelerator.prepare_model(
        trained_network(teacher, folder.weights, samples).to(world.device), evaluation_mode=True
    )
    labels = predict(model, samples, "training", world).classes
    differing = int((labels != samples.labels).sum())
    return samples.with_labels(
        labels,
        {
            "labels_from": config.labels_from,
            "weights_digest": result["weights_digest"],
            "differing": differing,
            "differing_share": differing / len(labels),
            "given_digest": samples.noise["digest"],
        },
    )
