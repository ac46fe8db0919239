"""The network of a training: as it begins, and as it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatwise.errors import UserError
from flatwise.files import read_json
from flatwise.lab.models import build_model
from flatwise.lab.train.checkpoint import DAMAGES
from flatwise.lab.train.config import TrainConfig, train_config_from
from flatwise.lab.train.folder import TrainFolder
from flatwise.lab.train.samples import Samples
from flatwise.lab.train.tensors import put_state
from flatwise.seeds import derive


def read_training(path: str) -> tuple[TrainConfig, TrainFolder, dict[str, Any]]:
    """Find a finished training.

    Args:
        path: its folder.

    Returns:
        Its settings, its folder and its result.

    Raises:
        UserError: there is none.
    """
    folder = TrainFolder(Path(path))
    result = read_json(folder.result)
    if not isinstance(result, dict) or not result.get("finished") or not folder.weights.exists():
        raise UserError(f"{path} is not the folder of a finished training (flatwise train prints it at its end)")
    return train_config_from(result["config"]), folder, result


def new_model(config: TrainConfig, samples: Samples) -> nn.Module:
    """Build the network with the weights that training begins with.

    Args:
        config: names it, and its seed.
        samples: say the size of images and the number of classes.

    Returns:
        The network.
    """
    return build_model(
        config.model,
        samples.shape,
        samples.classes,
        derive(config.seed, "weights"),
        pretrained=config.pretrained,
        keep_head=config.keep_head,
    )


def trained_network(config: TrainConfig, weights: Path, samples: Samples) -> nn.Module:
    """Build the network as a training left it, at its end or after an epoch.

    Args:
        config: its settings.
        weights: the file, in its folder.
        samples: say the size of images and the number of classes.

    Returns:
        The network, on the CPU.

    Raises:
        UserError: the weights are damaged.
    """
    model = build_model(config.model, samples.shape, samples.classes, config.seed)
    try:
        put_state(model.state_dict(), torch.load(weights, map_location="cpu", weights_only=True))
    except DAMAGES as error:
        raise UserError(f"{weights} cannot be read ({' '.join(str(error).split())[:200]})") from error
    return model
