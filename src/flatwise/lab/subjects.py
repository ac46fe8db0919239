"""What is to be measured: the networks of a run folder, one file of weights, or a problem of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatwise.errors import UnknownNameError, UserError
from flatwise.lab.config import CompareConfig
from flatwise.lab.data import load_data
from flatwise.lab.folder import RunFolder
from flatwise.lab.methods import trained_methods
from flatwise.lab.reporting import read_run
from flatwise.lab.split import make_split
from flatwise.lab.weights import trained_model
from flatwise.seeds import stream

LossFn = Callable[[nn.Module, Any], Tensor]
BATCH = 128
OWN = "model"
"""What a network is called that has no method's name."""


@dataclass(frozen=True)
class Subjects:
    """Networks with one loss on one set of samples.

    Attributes:
        models: by name.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss.
        data: batches.
        folder: takes what is written.
        identity: what made the networks.
        seed: of the trainings; 0 for a problem of the user's own.
        page: the run folder on whose page the measures will be shown, if there is one.
    """

    models: dict[str, nn.Module]
    loss_fn: LossFn
    data: Any
    folder: RunFolder
    identity: str
    seed: int
    page: Path | None = None


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the lab's loss.

    Args:
        model: the network.
        batch: images and labels.

    Returns:
        The mean cross-entropy.
    """
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def find_subjects(
    target: str, *, methods: Sequence[str] = (), seed: int = 0, samples: int = 1024, out: str | None = None
) -> Subjects:
    """Find what is to be measured.

    Args:
        target: a run folder, a file of weights in one, or ``module:function``, whose function returns
            ``(model, loss_fn, data)``.
        methods: which networks of a run folder; empty: all.
        seed: of the trainings.
        samples: training samples to measure on, drawn at random; the same for all methods.
        out: folder that takes what is written; None: the run folder, or the current one.

    Returns:
        What is to be measured.

    Raises:
        UserError: there is no such thing.
    """
    path = Path(target)
    if path.is_dir():
        return _of_run(path, methods, seed, samples, out)
    if path.is_file():
        name, seed = _of_weights(path)
        return _of_run(path.parent.parent, [name], seed, samples, out)
    if ":" in target:
        model, loss_fn, data = own_problem(target, 3)
        return Subjects({OWN: model}, loss_fn, data, RunFolder(Path(out or ".")), target, 0)
    raise UserError(
        f"{target!r} is no run folder, no file of weights and no module:function; "
        "flatwise compare prints the run folder it made"
    )


def own_problem(target: str, length: int) -> Any:
    """Call the user's function.

    Args:
        target: ``module:function``; the module is looked for in the current folder too.
        length: 3: it returns ``(model, loss_fn, data)``; 4: the optimizer too.

    Returns:
        What it returned.

    Raises:
        UserError: it cannot be imported, or returns something else.
    """
    module_name, _, name = target.partition(":")
    wanted = "(model, loss_fn, data, optimizer)" if length == 4 else "(model, loss_fn, data)"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import {target}: {error}; {name or 'problem'}() is to return {wanted}") from error
    found = function()
    if not isinstance(found, tuple) or len(found) != length or not isinstance(found[0], nn.Module):
        raise UserError(f"{target} must return {wanted}, got {type(found).__name__}")
    return found


def _of_weights(path: Path) -> tuple[str, int]:
    folder = RunFolder(path.resolve().parent.parent)
    config, _, _ = read_run(folder.path)
    for method in trained_methods(config):
        for seed in range(config.seeds):
            if folder.weights(method.name, seed).name == path.name:
                return method.name, seed
    raise UserError(f"{path} belongs to no method of the comparison in {folder.path}")


def _of_run(path: Path, methods: Sequence[str], seed: int, samples: int, out: str | None) -> Subjects:
    config, folder, results = read_run(path)
    known = [method.name for method in trained_methods(config)]
    for name in methods:
        if name not in known:
            raise UnknownNameError("method", name, known)
    if not 0 <= seed < config.seeds:
        raise UserError(f"--seed must be from 0 to {config.seeds - 1} in this run, not {seed}")
    models = {name: trained_model(config, folder, name, seed) for name in methods or known}
    return Subjects(
        models,
        cross_entropy,
        training_samples(config, seed, samples),
        folder if out is None else RunFolder(Path(out)),
        results["identity"],
        seed,
        path if out is None else None,
    )


def training_samples(config: CompareConfig, seed: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    """Draw training samples, with the labels that were trained on: it is their loss that was made small.

    Args:
        config: the settings of the comparison.
        seed: the run's seed.
        samples: how many; all where there are fewer.

    Returns:
        Batches of images and labels.

    Raises:
        UserError: ``samples`` is below 1.
    """
    if samples < 1:
        raise UserError(f"--samples must be at least 1, not {samples}")
    split = make_split(
        load_data(config.dataset, config.data_root),
        seed,
        train_size=config.train_size,
        validation_share=config.val_fraction,
        label_noise=config.label_noise,
    )
    order = torch.randperm(len(split.labels), generator=stream(seed, "measured samples"))[:samples]
    return [(split.inputs[part], split.labels[part]) for part in torch.split(order, BATCH)]
