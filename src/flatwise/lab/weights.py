"""The weights that a training ended with, and those that it began with."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flatwise.errors import UserError
from flatwise.files import write_atomically
from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.folder import RunFolder
from flatwise.lab.models import build_model
from flatwise.seeds import derive


def save_weights(path: Path, model: nn.Module | Mapping[str, Tensor]) -> None:
    """Write weights and buffers as a plain state_dict, atomically; ``torch.load(path)`` reads it.

    Args:
        path: the file.
        model: whose weights, or its state.
    """
    entries = model.state_dict() if isinstance(model, nn.Module) else model
    # Copied to the CPU and out of any larger storage that they are views of, which torch.save would write whole.
    state = {name: value.detach().cpu().clone() for name, value in entries.items()}
    # The result that is written after it says that the training is finished, and is durable too.
    write_atomically(path, lambda file: torch.save(state, file), durable=True)


def initial_model(config: CompareConfig, seed: int) -> nn.Module:
    """Build the network as every method of a seed began.

    Args:
        config: the settings of the comparison.
        seed: the run's seed.

    Returns:
        The network, in training mode.
    """
    data = load_data(config.dataset, config.data_root)
    return build_model(config.model, data.train_inputs.shape[1:], data.classes, derive(seed, "weights"))


def trained_model(config: CompareConfig, folder: RunFolder, name: str, seed: int) -> nn.Module:
    """Build the network as a method left it.

    Args:
        config: the settings of the comparison.
        folder: its run folder.
        name: the method.
        seed: the run's seed.

    Returns:
        The network, in evaluation mode.

    Raises:
        UserError: the folder has no such weights, or they are damaged; the text says how to get them.
    """
    from flatwise.lab.compare import command

    path = folder.weights(name, seed)
    again = f"{command(replace(config, out=str(folder.path.parent)))} --fresh"
    if not path.exists():
        if folder.job(name, seed).exists():
            raise UserError(
                f"{folder.path} has no weights of {name}, seed {seed}: it was made before weights were kept; "
                f"this trains again and keeps them: {again}"
            )
        raise UserError(f"{folder.path} has no finished training of {name}, seed {seed}; this trains it: {again}")
    model = initial_model(config, seed)
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200] or "it is empty or cut off"
        raise UserError(f"{path} holds no weights of this network ({reason}); this trains again: {again}") from error
    return model.eval()
