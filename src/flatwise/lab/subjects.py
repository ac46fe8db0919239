"""What is to be measured: the networks of a run folder, one file of weights, or a problem of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from flatwise.measure.data import read_batches
from flatwise.seeds import stream


class Asked(Protocol):
    """What names networks and samples on the command line."""

    @property
    def run(self) -> str:
        """A run folder, a file of weights in one, or ``module:function``, which returns ``(model, loss_fn, data)``."""

    @property
    def method(self) -> str | None:
        """Networks of a run folder, separated by commas; None: all."""

    @property
    def seed(self) -> int:
        """Of the trainings."""

    @property
    def samples(self) -> int:
        """Training samples to measure on, drawn at random; the same for all networks."""

    @property
    def out(self) -> str | None:
        """Folder that takes what is written; None: the run folder, or the current one."""


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

    def where(self, numbers: Path, picture: Path | None = None) -> str:
        """Say where what was measured is.

        Args:
            numbers: the file.
            picture: of them.

        Returns:
            One line, or two where a page can be made.
        """
        drawn = "" if picture is None else f"; the picture: {picture}"
        page = "" if self.page is None else f"\nOn the page: flatwise report {self.page}"
        return f"Every number: {numbers}{drawn}{page}"


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


def find_subjects(asked: Asked) -> Subjects:
    """Find what is to be measured.

    Args:
        asked: the networks and the samples.

    Returns:
        What is to be measured.

    Raises:
        UserError: there is no such thing.
    """
    path = Path(asked.run)
    if path.is_dir():
        return _of_run(path, _listed(asked.method), asked.seed, asked)
    if path.is_file():
        name, seed = _of_weights(path)
        return _of_run(path.parent.parent, [name], seed, asked)
    if ":" in asked.run:
        model, loss_fn, data = own_problem(asked.run, 3)
        # Read here: an iterator would be empty after the first measure.
        return Subjects(
            {OWN: model}, loss_fn, read_batches(data), RunFolder(Path(asked.out or ".")), asked.run, asked.seed
        )
    raise UserError(
        f"{asked.run!r} is no run folder, no file of weights and no module:function; "
        "flatwise compare prints the run folder it made"
    )


def _listed(methods: str | None) -> list[str]:
    return [name.strip() for name in (methods or "").split(",") if name.strip()]


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
    if not callable(function):
        raise UserError(f"{target} is no function; {name}() is to return {wanted}")
    found = function()
    if not isinstance(found, tuple) or len(found) != length or not isinstance(found[0], nn.Module):
        raise UserError(f"{target} must return {wanted}, got {type(found).__name__}")
    return found


def _of_weights(path: Path) -> tuple[str, int]:
    folder = RunFolder(path.resolve().parent.parent)
    if path.resolve().parent.name != "weights" or not folder.results.exists():
        raise UserError(
            f"{path} is no file of weights in a run folder, such as RUN/weights/sam-seed0.pt; "
            "a network of your own is measured as module:function, which returns (model, loss_fn, data)"
        )
    config, _, _ = read_run(folder.path)
    for method in trained_methods(config):
        for seed in range(config.seeds):
            if folder.weights(method.name, seed).name == path.name:
                return method.name, seed
    raise UserError(f"{path} belongs to no method of the comparison in {folder.path}")


def _of_run(path: Path, methods: Sequence[str], seed: int, asked: Asked) -> Subjects:
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
        training_samples(config, seed, asked.samples),
        folder if asked.out is None else RunFolder(Path(asked.out)),
        results["identity"],
        seed,
        path if asked.out is None else None,
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
